#include "tests/solver_case.h"

namespace diffkern::tests {

// ---- the call ----------------------------------------------------------------------------------------------------

SolverCase::SolverCase(const SampleShape& shape, DType dtype, Random& random)
    : shape(shape),
      dtype(dtype),
      variance(static_cast<Variance>(random.below(3))),
      clip(random.coin()),
      scales_input(random.coin()),
      source(shape.samples, random) {
    const auto tensor = [&] {
        return std::make_unique<Tensor>(operand_dtype(dtype, random), shape, random.below(4), random.below(2));
    };
    const auto of_dtype = [&] { return std::make_unique<Tensor>(dtype, shape, random.below(4), random.below(2)); };
    const auto per_sample = [&](bool one_each, double low, double high) {
        std::vector<double> values;
        for (int64_t i = 0; i < (one_each ? shape.samples : 1); ++i) values.push_back(random.real(low, high));
        return values;
    };
    x = of_dtype();
    uncond = tensor();
    if (random.coin()) {
        cond = tensor();
        guidance_scale = per_sample(random.coin(), 0, 8);
        if (random.coin()) guidance_rescale = per_sample(true, 0.5, 1);
    }
    if (variance != Variance::fixed) var = tensor();
    if (random.coin()) extra = tensor();
    if (random.coin()) noise = tensor();
    if (random.below(4) != 0) out = of_dtype();  // otherwise x is overwritten
    if (scales_input) x_in = of_dtype();
    if (clip && random.coin()) threshold = per_sample(true, 1, 3);
    for (int64_t k = random.below(random.below(8) ? 4 : kMaxSlots + 1); k > 0; --k) slots.push_back(tensor());
    for (int64_t i = 0; i < kRows * num_columns(); ++i) table.push_back(random.below(3) == 0 ? 0 : random.real(-2, 2));
    for (int64_t r = 0; r < kRows; ++r) {
        table[static_cast<size_t>(r * num_columns() + kLogVarMin)] = random.real(-10, -4);
        table[static_cast<size_t>(r * num_columns() + kLogVarMax)] = random.real(-4, 0);
        const int64_t first = random.below(num_slots() + 1) - 1, second = random.below(num_slots() + 1) - 1;
        writes.push_back(first);
        writes.push_back(second == first ? -1 : second);
    }
    for (int64_t i = random.coin() ? shape.samples : 1; i > 0; --i) row.push_back(random.below(kRows));
    fill(random);
}

void SolverCase::fill(Random& random) {
    for (Tensor* tensor : {x.get(), uncond.get(), cond.get(), extra.get(), noise.get()})
        if (tensor) tensor->fill(random, -3, 3);
    if (var) var->fill(random, variance == Variance::learned ? -10 : -1, variance == Variance::learned ? 0 : 1);
    for (const TensorPtr& slot : slots) slot->fill(random, -3, 3);
    // A value that is NaN comes out as NaN where it is read.
    x->buffer.set(random.below(x->size), std::nan(""));
    if (var) var->buffer.set(random.below(var->size), std::nan(""));
    for (int64_t sample = 0; sample < shape.samples; ++sample) poison_what_is_not_read(sample);
}

void SolverCase::poison_what_is_not_read(int64_t sample) {
    const double* c = coefficients(sample);
    // Over x' and the slots that are written: whether any has a coefficient for x, m, x0 (0, 1, 2) or slot k (3 + k).
    const auto used = [&](int64_t column) {
        bool any = column < 3 ? c[kCx + column] != 0 : c[kFixedColumns + column - 3] != 0;
        for (const int which : {0, 1}) any |= written(sample, which) >= 0 && write_block(sample, which)[column] != 0;
        return any;
    };
    const bool reads_extra = extra && (c[kCe] != 0 || c[kCv] != 0);
    if (!used(0) && !(used(2) && c[kAx] != 0)) x->poison(sample);
    if (!used(1) && !(used(2) && c[kAm] != 0)) {
        uncond->poison(sample);
        if (cond) cond->poison(sample);
    }
    if (var && c[kCz] == 0 && !(extra && c[kCv] != 0)) var->poison(sample);
    if (noise && c[kCz] == 0) noise->poison(sample);
    if (extra && !reads_extra) extra->poison(sample);
    for (int64_t k = 0; k < num_slots(); ++k)
        if (!used(3 + k)) slots[static_cast<size_t>(k)]->poison(sample);
}

SolverStepArgs SolverCase::args(int num_threads) const {
    const auto operand = [](const TensorPtr& tensor) { return tensor ? tensor->operand() : Operand{}; };
    const auto data = [](const std::vector<double>& values) { return values.empty() ? nullptr : values.data(); };
    SolverStepArgs args{};
    args.shape = shape;
    args.x = operand(x);
    args.uncond = operand(uncond);
    args.cond = operand(cond);
    args.var = operand(var);
    args.extra = operand(extra);
    args.noise = operand(noise);
    if (!noise) args.source = source.args();
    args.table = table.data();
    args.num_columns = num_columns();
    args.writes = writes.data();
    args.row = row.data();
    args.row_per_sample = row.size() > 1;
    args.guidance_scale = data(guidance_scale);
    args.guidance_per_sample = guidance_scale.size() > 1;
    args.guidance_rescale = data(guidance_rescale);
    args.threshold = data(threshold);
    args.clip = clip;
    args.clip_low = -1;
    args.clip_high = 1;
    args.variance = variance;
    args.num_slots = static_cast<int>(num_slots());
    for (size_t k = 0; k < slots.size(); ++k) args.slots[k] = slots[k]->operand();
    args.out = operand(out ? out : x);
    args.x_in = operand(x_in);
    args.num_threads = num_threads;
    return args;
}

std::string SolverCase::describe() const {
    return text(tests::describe(shape), " ", name_of(dtype), ", ", num_slots(), " slots, variance ",
                static_cast<int>(variance), cond ? ", guidance" : "", clip ? ", clip" : "",
                threshold.empty() ? "" : ", threshold", extra ? ", extra" : "", noise ? ", noise given" : "",
                out ? "" : ", in place");
}

// ---- its equations -----------------------------------------------------------------------------------------------

SolverOracle::SolverOracle(const SolverCase& solver, int64_t sample, int64_t i)
    : next(0, arithmetic_of(solver.dtype)),
      input(next),
      written{next, next},
      case_(solver),
      sample_(sample),
      i_(i),
      c_(solver.coefficients(sample)),
      arithmetic_(arithmetic_of(solver.dtype)),
      x_(exactly(solver.x->at(sample, i))),
      m_(model_output()),
      x0_(next) {
    const auto times = [&](double factor, const Bounded& value) {
        return factor == 0 ? exactly(0) : coefficient(factor, arithmetic_) * value;
    };
    x0_ = clipped(times(c_[kAx], x_) + times(c_[kAm], m_));
    next = combination(c_ + kCx, c_ + kFixedColumns);
    const bool fixed = solver.variance == Variance::fixed;
    if (c_[kCz] != 0) {
        NoiseArgs draw_is_row = solver.source.args();
        const int64_t row = solver.row_of(sample);
        draw_is_row.draws = &row;
        draw_is_row.draw_per_sample = false;
        const Bounded z = solver.noise ? exactly(solver.noise->at(sample, i))
                                       : noise_at(draw_is_row, solver.shape, sample, i, solver.dtype);
        next = next + times(c_[kCz], fixed ? z : z * sigma());
    }
    if (solver.extra && (c_[kCe] != 0 || c_[kCv] != 0)) {
        const Bounded e = exactly(solver.extra->at(sample, i));
        next = next + times(c_[kCe], e);
        if (c_[kCv] != 0) next = next + times(c_[kCv], fixed ? e : sigma() * sigma() * e);
    }
    input = coefficient(c_[kScale], arithmetic_) * next;
    for (const int which : {0, 1})
        if (solver.written(sample, which) >= 0) {
            const double* block = solver.write_block(sample, which);
            written[which] = combination(block, block + 3);
        }
}

Bounded SolverOracle::model_output() const {
    Bounded m = exactly(case_.uncond->at(sample_, i_));
    if (case_.cond) {
        const Bounded w = coefficient(SolverCase::of_sample(case_.guidance_scale, sample_), arithmetic_);
        m = m + w * (exactly(case_.cond->at(sample_, i_)) - m);
    }
    if (!case_.guidance_rescale.empty())
        m = m * coefficient(SolverCase::of_sample(case_.guidance_rescale, sample_), arithmetic_);
    return m;
}

Bounded SolverOracle::clipped(Bounded x0) const {
    if (!case_.clip) return x0;
    if (case_.threshold.empty()) return clamp(x0, exactly(-1), exactly(1));
    const Bounded s = coefficient(SolverCase::of_sample(case_.threshold, sample_), arithmetic_);
    return clamp(x0, exactly(-1) * s, s) / s;
}

Bounded SolverOracle::combination(const double* base, const double* of_slots) const {
    Bounded total = exactly(0);
    const auto add = [&](double factor, const Bounded& value) {
        if (factor != 0) total = total + coefficient(factor, arithmetic_) * value;
    };
    add(base[0], x_);
    add(base[1], m_);
    add(base[2], x0_);
    for (int64_t k = 0; k < case_.num_slots(); ++k)
        add(of_slots[k], exactly(case_.slots[static_cast<size_t>(k)]->at(sample_, i_)));
    return total;
}

Bounded SolverOracle::sigma() const {
    Bounded log_variance = exactly(case_.var->at(sample_, i_));
    if (case_.variance == Variance::learned_range) {
        const Bounded fraction = (log_variance + exactly(1)) * exactly(0.5);
        log_variance = fraction * coefficient(c_[kLogVarMax], arithmetic_) +
                       (exactly(1) - fraction) * coefficient(c_[kLogVarMin], arithmetic_);
    }
    return exp(log_variance * exactly(0.5), 2);  // float32: vec.h's exponential is below 2 ulp
}

}  // namespace diffkern::tests
