// solver_step: random rows of random programs, with every combination of what a call may have, against the equations.
// What a row gives a coefficient of zero is NaN: it must not be read.
#include "tests/solver_case.h"

namespace diffkern::tests {
namespace {

// Everything that the call must leave, from the case as it was before.
struct Expected {
    std::vector<SolverOracle> values;  // (N, size)
    std::vector<Buffer> slots;

    explicit Expected(const SolverCase& solver) {
        for (int64_t sample = 0; sample < solver.shape.samples; ++sample)
            for (int64_t i = 0; i < solver.x->size; ++i) values.emplace_back(solver, sample, i);
        for (const TensorPtr& slot : solver.slots) slots.emplace_back(slot->buffer);
    }
};

void check(const SolverCase& solver, const char* name, const Tensor& actual, int64_t sample, int64_t i,
           const Bounded& expected) {
    CHECK(expected.allows(actual.at(sample, i), actual.buffer.dtype()), name, " of sample ", sample, " position ", i,
          ": ", actual.at(sample, i), " for ", expected.value, " +- ", expected.error, ", ", solver.describe());
}

void check_slots(const SolverCase& solver, const Expected& expected, int64_t sample, int64_t i) {
    const SolverOracle& oracle = expected.values[static_cast<size_t>(sample * solver.x->size + i)];
    for (int64_t k = 0; k < solver.num_slots(); ++k) {
        const Tensor& slot = *solver.slots[static_cast<size_t>(k)];
        const double before = expected.slots[static_cast<size_t>(k)].get(sample * slot.stride + i);
        if (k == solver.written(sample, 0))
            check(solver, "first written slot", slot, sample, i, oracle.written[0]);
        else if (k == solver.written(sample, 1))
            check(solver, "second written slot", slot, sample, i, oracle.written[1]);
        else
            CHECK(slot.at(sample, i) == before || (std::isnan(before) && std::isnan(slot.at(sample, i))), "slot ", k,
                  " changed, ", solver.describe());
    }
}

}  // namespace

TEST(solver_step, is_the_equations) {
    Random random(6);
    for (int round = 0; round < 6; ++round)
        for (const SampleShape& shape : shapes())
            for (const DType dtype : kDtypes) {
                const SolverCase solver(in_format(shape, random.coin()), dtype, random);
                const Expected expected(solver);
                solver_step(solver.args(1));
                const Tensor& out = solver.out ? *solver.out : *solver.x;
                for (int64_t sample = 0; sample < shape.samples; ++sample)
                    for (int64_t i = 0; i < out.size; ++i) {
                        const SolverOracle& oracle = expected.values[static_cast<size_t>(sample * out.size + i)];
                        check(solver, "x'", out, sample, i, oracle.next);
                        if (solver.x_in) check(solver, "x_in", *solver.x_in, sample, i, oracle.input);
                        check_slots(solver, expected, sample, i);
                    }
                for (const Tensor* tensor : {&out, static_cast<const Tensor*>(solver.x_in.get())})
                    CHECK(!tensor || tensor->gaps_are_untouched(), solver.describe());
                for (const TensorPtr& slot : solver.slots) CHECK(slot->gaps_are_untouched(), solver.describe());
            }
}

}  // namespace diffkern::tests
