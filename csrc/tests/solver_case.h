// A random call of solver_step, and the equations of its header for one value of it.
#pragma once

#include <memory>

#include "cpu/solver_step.h"
#include "tests/pointwise.h"

namespace diffkern::tests {

using TensorPtr = std::unique_ptr<Tensor>;

struct SolverCase {
    static constexpr int64_t kRows = 3;

    SampleShape shape;
    DType dtype;  // of x and out; the arithmetic follows from it
    Variance variance;
    bool clip, scales_input;
    TensorPtr x, uncond, cond, var, extra, noise, out, x_in;
    std::vector<TensorPtr> slots;
    std::vector<double> table, guidance_scale, guidance_rescale, threshold;
    std::vector<int64_t> writes, row;
    Source source;

    SolverCase(const SampleShape& shape, DType dtype, Random& random);

    int64_t num_columns() const {
        return kFixedColumns + num_slots() + 2 * (3 + num_slots());
    }
    int64_t num_slots() const {
        return static_cast<int64_t>(slots.size());
    }
    // A vector with one value for all samples, or with one each.
    template <class T>
    static T of_sample(const std::vector<T>& values, int64_t sample) {
        return values[values.size() == 1 ? 0 : static_cast<size_t>(sample)];
    }
    int64_t row_of(int64_t sample) const {
        return of_sample(row, sample);
    }
    const double* coefficients(int64_t sample) const {
        return table.data() + row_of(sample) * num_columns();
    }
    // The slot that the row of this sample writes first (which = 0) or second, or -1; and its [g_x, g_m, g_0, g_h...].
    int64_t written(int64_t sample, int which) const {
        return writes[static_cast<size_t>(2 * row_of(sample) + which)];
    }
    const double* write_block(int64_t sample, int which) const {
        return coefficients(sample) + kFixedColumns + num_slots() + which * (3 + num_slots());
    }
    SolverStepArgs args(int num_threads) const;
    std::string describe() const;

 private:
    void fill(Random& random);
    void poison_what_is_not_read(int64_t sample);
};

// The equations for the value at position i of a sample, from what the case holds: before the call.
class SolverOracle {
 public:
    SolverOracle(const SolverCase& solver, int64_t sample, int64_t i);

    Bounded next, input;  // x' and x_in
    Bounded written[2];   // h' of the two slots, where the row writes them

 private:
    Bounded model_output() const;
    Bounded clipped(Bounded x0) const;
    Bounded combination(const double* base, const double* of_slots) const;
    Bounded sigma() const;
    Bounded exactly(double value) const {
        return {value, arithmetic_};
    }

    const SolverCase& case_;
    int64_t sample_, i_;
    const double* c_;
    Arithmetic arithmetic_;
    Bounded x_, m_, x0_;
};

}  // namespace diffkern::tests
