// attention, backward, against the formulas of docs/attention.md in double.
#include <algorithm>

#include "tests/attention_case.h"

namespace diffkern::tests {
namespace {

// What the backward pass is given: the results of the forward pass as they are stored.
void fill_results(AttentionCase& attention) {
    const AttentionSize& size = attention.size;
    for (int64_t n = 0; n < size.batch; ++n)
        for (int64_t h = 0; h < size.heads; ++h)
            for (int64_t query = 0; query < size.queries; ++query) {
                const Scores scores(attention, n, h, query);
                const double most = static_cast<float>(*std::max_element(scores.value.begin(), scores.value.end()));
                double sum = 0;
                for (const double score : scores.value) sum += std::exp(score - most);
                for (int64_t c = 0; c < size.head_dim; ++c) {
                    double total = 0;
                    for (int64_t key = 0; key < size.keys; ++key)
                        total +=
                            std::exp(scores.value[static_cast<size_t>(key)] - most) * attention.v.get(n, h, key, c);
                    attention.out.buffer.set(attention.out.at(n, h, query, c), total / sum);
                }
                attention.set_log_sum_exp((n * size.heads + h) * size.queries + query, most, std::log(sum));
            }
}

// The weights and the gradients of the scores of a head, [query][key], and how far each may be off.
struct Matrices {
    int64_t keys;
    std::vector<double> weight, weight_error, dscore, dscore_error;

    Matrices(const AttentionCase& attention, int64_t n, int64_t h) : keys(attention.size.keys) {
        const AttentionSize& size = attention.size;
        for (int64_t query = 0; query < size.queries; ++query) {
            const Scores scores(attention, n, h, query);
            const double lse = attention.log_sum_exp((n * size.heads + h) * size.queries + query);
            const Product sum = product(attention.dout, query, attention.out, query, n, h);
            for (int64_t key = 0; key < keys; ++key) {
                const auto j = static_cast<size_t>(key);
                const double logarithm = scores.value[j] - lse;
                const double off =
                    scores.error[j] + kHalfUlp * (2 * std::fabs(scores.value[j]) + 4 * std::fabs(logarithm) + 8);
                const double p = std::exp(logarithm), relative = std::expm1(off) + 4 * kHalfUlp;
                const Product dp = product(attention.dout, query, attention.v, key, n, h);
                const double difference = dp.value - sum.value;
                weight.push_back(p);
                weight_error.push_back(p * relative);
                dscore.push_back(p * difference);
                dscore_error.push_back(p * (relative + 4 * kHalfUlp) * std::fabs(difference) +
                                       (1 + relative) * p * (dp.error(size.head_dim) + sum.error(size.head_dim)));
            }
        }
    }
    size_t at(int64_t query, int64_t key) const {
        return static_cast<size_t>(query * keys + key);
    }
};

// A sum of products of which one factor may be off.
struct Gradient {
    double value = 0, size = 0, error = 0;

    void add(double a, double a_error, double b) {
        value += a * b;
        size += std::fabs(a * b);
        error += a_error * std::fabs(b);
    }
    void check(const AttentionCase& attention, double actual, double scale, int64_t terms, const char* name) const {
        attention.check(actual, scale * value, std::fabs(scale) * (error + sum_error(terms, size + error)),
                        attention.dtype, name);
    }
};

void check_head(const AttentionCase& attention, int64_t n, int64_t h) {
    const AttentionSize& size = attention.size;
    const Matrices m(attention, n, h);
    for (int64_t c = 0; c < size.head_dim; ++c) {
        Product keys;  // dq is made of keys less their mean: rows of the stored results do not quite sum to nothing
        for (int64_t key = 0; key < size.keys; ++key)
            keys.add(1.0 / static_cast<double>(size.keys), attention.k.get(n, h, key, c));
        for (int64_t query = 0; query < size.queries; ++query) {
            Gradient dq;
            for (int64_t key = 0; key < size.keys; ++key) {
                const size_t i = m.at(query, key);
                const double less = attention.k.get(n, h, key, c) - keys.value;
                dq.add(m.dscore[i], m.dscore_error[i], less);
                dq.error += std::fabs(m.dscore[i]) * (keys.error(size.keys) + kHalfUlp * std::fabs(less));
            }
            dq.check(attention, attention.dq.get(n, h, query, c), attention.scale, size.keys, "dq");
        }
        for (int64_t key = 0; key < size.keys; ++key) {
            Gradient dk, dv;
            for (int64_t query = 0; query < size.queries; ++query) {
                const size_t i = m.at(query, key);
                dk.add(m.dscore[i], m.dscore_error[i], attention.q.get(n, h, query, c));
                dv.add(m.weight[i], m.weight_error[i], attention.dout.get(n, h, query, c));
            }
            dk.check(attention, attention.dk.get(n, h, key, c), attention.scale, size.queries, "dk");
            dv.check(attention, attention.dv.get(n, h, key, c), 1, size.queries, "dv");
        }
    }
}

}  // namespace

// A last panel of every length in all three directions; more than one block of queries, of keys and of channels; the
// narrow block at the end and alone.
TEST(attention_backward, is_the_derivative) {
    Random random(24);
    std::vector<AttentionSize> sizes = {{1, 1, 1, 1, 1},    {2, 1, 70, 150, 8}, {1, 2, 33, 65, 40}, {1, 1, 130, 5, 3},
                                        {1, 3, 17, 77, 24}, {1, 1, 9, 20, 200}, {3, 2, 16, 16, 16}};
    for (int64_t n = 2; n <= 34; ++n) {
        sizes.push_back({1, 2, n, 3, 2});
        sizes.push_back({2, 1, 2, n, 3});
        sizes.push_back({1, 1, 3, 2, n});
    }
    for (const AttentionSize& size : sizes)
        for (const HeadLayout layout : kHeadLayouts)
            for (const DType dtype : kFloat32AndBelow) {
                AttentionCase attention(size, layout, dtype, random);
                fill_results(attention);
                attention_backward(attention.backward_args(1));
                for (int64_t n = 0; n < size.batch; ++n)
                    for (int64_t h = 0; h < size.heads; ++h) check_head(attention, n, h);
                for (const HeadsBuffer* grad : {&attention.dq, &attention.dk, &attention.dv})
                    CHECK(grad->numbers() == grad->elements(), "written between", attention.describe());
            }
}

}  // namespace diffkern::tests
