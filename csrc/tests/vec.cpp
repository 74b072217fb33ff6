// vec.h and intrinsics.h: loads and stores at every length and misalignment, conversions, sum, exp and silu.
#include "tests/buffer.h"
#include "tests/probe.h"
#include "tests/rounding.h"

namespace diffkern::tests {
namespace {

int lanes() {
    int lanes = 0;
    probe_lanes({&lanes});
    return lanes;
}

Buffer mapped(Function function, const Buffer& x) {
    Buffer y(DType::f32, x.count());
    probe_map({function, x.as<float>(), y.as<float>(), x.count()});
    return y;
}

// Every float32 with `step` between their bits, and the ends.
Buffer walk(uint32_t step) {
    const auto count = static_cast<int64_t>(0xffffffffu / step);
    Buffer x(DType::f32, count + 4);
    for (int64_t i = 0; i < count; ++i) x.as<uint32_t>()[i] = static_cast<uint32_t>(i) * step;
    const float inf = std::numeric_limits<float>::infinity();
    const float ends[] = {0.0f, -0.0f, inf, -inf};
    std::memcpy(x.as<float>() + count, ends, sizeof ends);
    return x;
}

Buffer grid(double low, double high, int64_t count) {
    Buffer x(DType::f32, count);
    for (int64_t i = 0; i < count; ++i)
        x.set(i, low + (high - low) * static_cast<double>(i) / static_cast<double>(count - 1));
    return x;
}

// |a - b| in units of the last place of a float32 next to b.
double ulps(double a, long double b) {
    return static_cast<double>(std::fabs(a - b) / std::ldexp(1.0L, std::ilogb(b) - 23));
}

void check_exp(const Buffer& x) {
    const Buffer y = mapped(Function::exp_clamped, x);
    for (int64_t i = 0; i < x.count(); ++i) {
        const double value = x.get(i), actual = y.get(i);
        CHECK(actual > 0 && std::isfinite(actual), "exp(", value, ") = ", actual);
        if (std::isnan(value)) continue;
        const long double exact = std::exp(static_cast<long double>(std::fmin(std::fmax(value, -87), 88)));
        CHECK(ulps(actual, exact) < 2, "exp(", value, ") = ", actual, ", ", ulps(actual, exact), " ulp off");
    }
}

// silu(x) = x / (1 + e), e = exp(-x) within 2 ulp, and a 75 millionth of |x| more: the sum and the quotient round once
// more each, 3 float32 epsilons in all. Near -88 e overflows, as torch's does, and what is left of x e^x is dropped.
void check_silu(const Buffer& x) {
    const Buffer y = mapped(Function::silu, x);
    for (int64_t i = 0; i < x.count(); ++i) {
        const auto value = static_cast<long double>(x.get(i));
        const double actual = y.get(i);
        if (std::isnan(value) || value == -std::numeric_limits<long double>::infinity()) {
            CHECK(std::isnan(actual), "silu(", value, ") = ", actual);
            continue;
        }
        const long double exact = value / (1 + std::exp(-value));
        if (std::isinf(exact) || value == 0) {
            CHECK(static_cast<long double>(actual) == exact, "silu(", value, ") = ", actual);
            continue;
        }
        const long double share = 4 * 0x1p-23L + (value < 0 ? -value / 75e6L : 0);
        const long double dropped = value < -87.9L ? 6e-37L : 0x1p-149L;
        CHECK(std::fabs(actual - exact) <= share * std::fabs(exact) + dropped, "silu(", value, ") = ", actual,
              ", exact ", exact);
    }
}

template <class T>
void check_conversions(DType dtype) {
    std::vector<float> hard;
    for_hard_floats<T>([&](float value) { hard.push_back(value); });
    const auto count = static_cast<int64_t>(hard.size());
    Buffer narrow(dtype, count);
    probe_copy({DType::f32, dtype, reinterpret_cast<const char*>(hard.data()), narrow.data(), count});
    for (int64_t i = 0; i < count; ++i) {
        const float value = hard[static_cast<size_t>(i)];
        CHECK(same_value(narrow.get(i), rounded<T>(value)), value, " became ", narrow.get(i));
    }
    Buffer every(dtype, 0x10000), wide(DType::f32, 0x10000);
    for (int64_t i = 0; i < 0x10000; ++i) every.as<uint16_t>()[i] = static_cast<uint16_t>(i);
    probe_copy({dtype, DType::f32, every.data(), wide.data(), 0x10000});
    for (int64_t i = 0; i < 0x10000; ++i) CHECK(same_value(wide.get(i), every.get(i)), std::hex, i);
}

}  // namespace

TEST(vec, loads_and_stores_of_every_length_and_misalignment) {
    Random random(1);
    for (const DType from : kDtypes)
        for (const DType to : kDtypes) {
            if ((from == DType::f64) != (to == DType::f64)) continue;
            for (int64_t count = 0; count <= 2 * lanes() + 1; ++count)
                for (int64_t offset = 0; offset <= lanes(); ++offset) {
                    Buffer in(from, count, offset), out(to, count, offset);
                    random.fill(in, -4, 4);
                    Buffer expected(to, count, offset);
                    for (int64_t i = 0; i < count; ++i) expected.set(i, in.get(i));
                    probe_copy({from, to, in.data(), out.data(), count});
                    CHECK(out.same_bits(expected), name_of(from), " to ", name_of(to), ", ", count, " at ", offset);
                }
        }
}

TEST(vec, the_other_lanes_of_a_partial_load_are_zero) {
    for (const DType dtype : kDtypes)
        for (int n = 1; n < lanes(); ++n) {
            Buffer in(dtype, n);
            for (int i = 0; i < n; ++i) in.set(i, i + 1);
            Buffer out(dtype == DType::f64 ? DType::f64 : DType::f32, lanes());
            probe_partial({dtype, in.data(), n, out.data()});
            for (int i = 0; i < lanes(); ++i) CHECK(out.get(i) == (i < n ? i + 1 : 0), name_of(dtype), " ", n, " ", i);
        }
}

TEST(vec, conversions_to_and_from_bf16) {
    check_conversions<bf16>(DType::bf16);
}
TEST(vec, conversions_to_and_from_f16) {
    check_conversions<f16>(DType::f16);
}

TEST(vec, sum_folds_halves_onto_each_other) {
    Random random(2);
    for (int round = 0; round < 1000; ++round) {
        Buffer x(DType::f32, lanes());
        random.fill(x, -1, 1);
        float total = 0;
        probe_sum({x.as<float>(), &total});
        std::vector<float> folded(x.as<float>(), x.as<float>() + lanes());
        for (size_t half = folded.size() / 2; half > 0; half /= 2)
            for (size_t i = 0; i < half; ++i) folded[i] += folded[i + half];
        CHECK(total == folded[0], total, " for ", folded[0]);
    }
}

TEST(vec, exp_below_two_ulp) {
    check_exp(walk(9973));
    check_exp(grid(-90, 90, 500000));
}

TEST(vec, silu) {
    check_silu(walk(9973));
    check_silu(grid(-90, 90, 500000));
    Buffer nan(DType::f32, 1);
    CHECK(std::isnan(mapped(Function::silu, nan).get(0)));
}

TEST(vec, sqrt_is_rounded_correctly) {
    const Buffer x = walk(9973), y = mapped(Function::sqrt, x);
    for (int64_t i = 0; i < x.count(); ++i)
        CHECK(same_value(y.get(i), std::sqrt(x.as<float>()[i])), "sqrt(", x.get(i), ") = ", y.get(i));
}

}  // namespace diffkern::tests
