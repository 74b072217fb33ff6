// attention, forward, against the softmax in double.
#include <algorithm>
#include <limits>

#include "tests/attention_case.h"

namespace diffkern::tests {
namespace {

// The weights, not divided, relative errors of them, and of their sum.
struct Weights {
    std::vector<double> value, error;
    double lse, lse_error, sum = 0, sum_error = 0;

    Weights(const AttentionCase& attention, int64_t n, int64_t h, int64_t query) {
        const Scores scores(attention, n, h, query);
        const double most = *std::max_element(scores.value.begin(), scores.value.end());
        for (size_t j = 0; j < scores.value.size(); ++j) {
            const double below = most - scores.value[j];
            // Once for the score, once for the maximum, roundings of their difference; an exponential is off by an ulp.
            const double off = scores.error[j] + kHalfUlp * 4 * below;
            value.push_back(std::exp(-below));
            error.push_back(std::expm1(off) + 4 * kHalfUlp);
            sum += value[j];
            sum_error += value[j] * error[j];
        }
        sum_error = sum_error / sum + kHalfUlp * static_cast<double>(value.size() + 8);
        lse = most + std::log(sum);
        // The scale is rounded, and on the portable path its product with the largest.
        lse_error = sum_error + scores.error[0] + kHalfUlp * (2 * std::fabs(most) + 8 * (1 + std::fabs(lse - most)));
    }
};

void check_row(const AttentionCase& attention, int64_t n, int64_t h, int64_t query) {
    const Weights weights(attention, n, h, query);
    const AttentionSize& size = attention.size;
    for (int64_t c = 0; c < size.head_dim; ++c) {
        double total = 0, error = 0;
        for (int64_t key = 0; key < size.keys; ++key) {
            const auto j = static_cast<size_t>(key);
            const double term = weights.value[j] * attention.v.get(n, h, key, c);
            total += term;
            error += std::fabs(term) * weights.error[j] + sum_error(size.keys, std::fabs(term));
        }
        const double value = total / weights.sum;
        attention.check(attention.out.get(n, h, query, c), value,
                        error / weights.sum + std::fabs(value) * (weights.sum_error + 4 * kHalfUlp), attention.dtype,
                        "out");
    }
    attention.check(attention.log_sum_exp((n * size.heads + h) * size.queries + query), weights.lse, weights.lse_error,
                    DType::f32, "lse");
}

template <class Fn>
void for_each_row(const AttentionSize& size, Fn fn) {
    for (int64_t n = 0; n < size.batch; ++n)
        for (int64_t h = 0; h < size.heads; ++h)
            for (int64_t query = 0; query < size.queries; ++query) fn(n, h, query);
}

}  // namespace

// One query, one key, one channel; a last panel of every length in all three directions; more than one block of
// queries, of keys and of channels; the narrow block at the end and alone.
TEST(attention, is_softmax_attention) {
    Random random(21);
    std::vector<AttentionSize> sizes = {{1, 1, 1, 1, 1},    {2, 1, 70, 300, 8}, {1, 2, 33, 129, 40}, {1, 1, 130, 5, 3},
                                        {1, 3, 17, 77, 64}, {1, 1, 9, 20, 200}, {3, 2, 16, 16, 16}};
    for (int64_t n = 2; n <= 34; ++n) {
        sizes.push_back({1, 2, n, 3, 2});
        sizes.push_back({2, 1, 2, n, 3});
        sizes.push_back({1, 1, 3, 2, n});
    }
    for (const AttentionSize& size : sizes)
        for (const HeadLayout layout : kHeadLayouts)
            for (const DType dtype : kFloat32AndBelow) {
                const AttentionCase attention(size, layout, dtype, random);
                diffkern::attention(attention.forward_args(1));
                for_each_row(size, [&](int64_t n, int64_t h, int64_t query) { check_row(attention, n, h, query); });
                CHECK(attention.out.numbers() == attention.out.elements(), "written between", attention.describe());
            }
}

// A row without a finite score gives 0, one with NaN or +inf NaN; others, and other heads, stay as they are.
TEST(attention, what_is_not_finite_stays_in_its_row) {
    constexpr double kInf = std::numeric_limits<double>::infinity();
    struct Kind {
        double query;
        bool zero;
    };
    for (const Kind kind : {Kind{std::nan(""), false}, Kind{kInf, false}, Kind{-kInf, true}})
        for (const int64_t keys : {1, 7, 300}) {
            Random random(22);
            AttentionCase attention({2, 2, 40, keys, 5}, HeadLayout::planes, DType::f32, random);
            attention.scale = 0.5;
            for (int64_t key = 0; key < keys; ++key) attention.k.buffer.set(attention.k.at(1, 0, key, 2), 1);
            attention.q.buffer.set(attention.q.at(1, 0, 35, 2), kind.query);
            diffkern::attention(attention.forward_args(1));
            for_each_row(attention.size, [&](int64_t n, int64_t h, int64_t query) {
                if (n != 1 || h != 0 || query != 35) return check_row(attention, n, h, query);
                for (int64_t c = 0; c < 5; ++c) {
                    const double out = attention.out.get(n, h, query, c);
                    CHECK(kind.zero ? out == 0 : std::isnan(out), out, " for ", kind.query, ", ", keys, " keys");
                }
            });
        }
}

// Whole blocks of keys that have no weight, before scores far below 0.
TEST(attention, a_block_of_minus_infinity_leaves_the_others) {
    Random random(25);
    AttentionCase attention({1, 1, 3, 300, 1}, HeadLayout::rows, DType::f32, random);
    attention.scale = 1;
    for (int64_t query = 0; query < 3; ++query) attention.q.buffer.set(attention.q.at(0, 0, query, 0), 1);
    for (int64_t key = 0; key < 300; ++key) {
        attention.k.buffer.set(attention.k.at(0, 0, key, 0),
                               key < 280 ? -std::numeric_limits<double>::infinity() : -1000);
        attention.v.buffer.set(attention.v.at(0, 0, key, 0), key < 280 ? 5 : 3);
    }
    diffkern::attention(attention.forward_args(1));
    for (int64_t query = 0; query < 3; ++query) {
        attention.check(attention.out.get(0, 0, query, 0), 3, sum_error(20, 3), DType::f32, "out");
        attention.check(attention.log_sum_exp(query), std::log(20.0) - 1000, sum_error(20, 1), DType::f32, "lse");
    }
}

TEST(attention, the_sums_are_written_only_where_wanted) {
    Random random(23);
    const AttentionCase attention({1, 2, 40, 9, 8}, HeadLayout::rows, DType::f32, random);
    AttentionArgs args = attention.forward_args(1);
    args.lse = nullptr;
    diffkern::attention(args);
    CHECK(attention.out.numbers() == attention.out.elements(), "not all of the output");
    CHECK(std::isnan(attention.lse.get(0)), "something was written");
}

}  // namespace diffkern::tests
