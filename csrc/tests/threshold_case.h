// A random call of dynamic_threshold.
#pragma once

#include <memory>

#include "cpu/dynamic_threshold.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

struct ThresholdCase {
    static constexpr int64_t kRows = 3, kColumns = 4;

    SampleShape shape;
    bool guided;
    Tensor x, uncond, cond;
    std::vector<double> table, rescale;
    std::vector<int64_t> row;
    double guidance_scale, ratio, largest;
    Buffer threshold;

    ThresholdCase(const SampleShape& shape, DType dtype, Random& random)
        : shape(shape),
          guided(random.coin()),
          x(dtype, shape, random.below(4), random.below(2)),
          uncond(operand_dtype(dtype, random), shape, random.below(4), random.below(2)),
          cond(operand_dtype(dtype, random), shape, random.below(4), random.below(2)),
          guidance_scale(random.real(0, 8)),
          ratio(random.below(4) == 0 ? 1 : random.real(0.3, 1)),
          largest(random.coin() ? 1.5 : 1e6),
          threshold(DType::f64, shape.samples) {
        for (int64_t i = 0; i < kRows * kColumns; ++i) table.push_back(random.real(-2, 2));
        table[kColumns] = 0;  // row 1 does not read x, which is then NaN
        for (int64_t i = 0; i < shape.samples; ++i) {
            rescale.push_back(random.real(0.5, 1));
            row.push_back(random.below(kRows));
        }
        for (Tensor* tensor : {&x, &uncond, &cond}) tensor->fill(random, -6, 6);
        for (int64_t sample = 0; sample < shape.samples; ++sample)
            if (row[static_cast<size_t>(sample)] == 1) x.poison(sample);
        if (random.below(3) == 0) uncond.buffer.set(random.below(uncond.size), -std::nan(""));
        if (!guided) cond.buffer.set(0, std::nan(""));
        // Scratch of exactly what the kernel may touch.
        scratch_ = std::make_unique<Buffer>(dtype == DType::f64 ? DType::f64 : DType::f32,
                                            kMaxTasks * threshold_scratch(x.size));
    }

    const double* coefficients(int64_t sample) const {
        return table.data() + row[static_cast<size_t>(sample)] * kColumns;
    }
    DynamicThresholdArgs args(int num_tasks) const {
        return {shape,
                x.operand(),
                uncond.operand(),
                guided ? cond.operand() : Operand{},
                table.data(),
                kColumns,
                row.data(),
                true,
                guided ? &guidance_scale : nullptr,
                false,
                guided ? rescale.data() : nullptr,
                ratio,
                largest,
                scratch_->data(),
                threshold.as<double>(),
                num_tasks};
    }

 private:
    static constexpr int64_t kMaxTasks = 4;
    std::unique_ptr<Buffer> scratch_;
};

}  // namespace diffkern::tests
