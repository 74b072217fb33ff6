// linear_attention, forward and backward, against docs/linear_attention.md in double.
#include "tests/linear_attention_case.h"

#include <algorithm>
#include <vector>

namespace diffkern::tests {
namespace {

using Matrix = std::vector<std::vector<double>>;  // [channel][position], or [channel][channel]

Matrix matrix(int64_t rows, int64_t columns) {
    return Matrix(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(columns)));
}

void softmax(std::vector<double*> values) {
    double most = *values[0], total = 0;
    for (const double* v : values) most = std::max(most, *v);
    for (double* v : values) total += * v = std::exp(*v - most);
    for (double* v : values) *v /= total;
}

// One head of one sample, its keys behind those of the memory.
struct Exact {
    int64_t d, positions, remembered;
    Matrix p, w, v, dout, out, dq, dk, dv;

    Exact(const LinearAttentionCase& of, int64_t n, int64_t h)
        : d(of.shape.channels), positions(of.shape.positions), remembered(of.shape.remembered) {
        const int64_t heads = of.shape.heads, keys = positions + remembered;
        p = out = dout = dq = matrix(d, positions);
        w = v = dk = dv = matrix(d, keys);
        for (int64_t c = 0; c < d; ++c) {
            for (int64_t i = 0; i < positions; ++i) {
                at(p, c, i) = of.qkv.buffer.get(of.qkv.index(n, h, c, i, 0, heads));
                at(w, c, remembered + i) = of.qkv.buffer.get(of.qkv.index(n, h, c, i, 1, heads));
                at(v, c, remembered + i) = of.qkv.buffer.get(of.qkv.index(n, h, c, i, 2, heads));
                at(dout, c, i) = of.dout.buffer.get(of.dout.index(n, h, c, i));
            }
            for (int64_t i = 0; i < remembered; ++i) {
                at(w, c, i) = of.memory.buffer.get(of.memory.index(0, h, c, i));
                at(v, c, i) = of.memory.buffer.get(of.memory.index(1, h, c, i));
            }
        }
        normalise();
        differentiate(static_cast<double>(of.scale));
    }
    static double& at(Matrix& m, int64_t row, int64_t column) {
        return m[static_cast<size_t>(row)][static_cast<size_t>(column)];
    }

 private:
    void normalise() {
        for (int64_t i = 0; i < positions; ++i) {
            std::vector<double*> column;
            for (int64_t c = 0; c < d; ++c) column.push_back(&at(p, c, i));
            softmax(column);
        }
        for (auto& row : w) {
            std::vector<double*> pointers;
            for (double& value : row) pointers.push_back(&value);
            softmax(pointers);
        }
    }
    void differentiate(double scale) {
        const int64_t keys = positions + remembered;
        Matrix context = matrix(d, d), dcontext = matrix(d, d);
        for (int64_t a = 0; a < d; ++a)
            for (int64_t e = 0; e < d; ++e) {
                for (int64_t i = 0; i < keys; ++i) at(context, a, e) += at(w, a, i) * at(v, e, i);
                for (int64_t i = 0; i < positions; ++i) at(dcontext, a, e) += scale * at(p, a, i) * at(dout, e, i);
            }
        for (int64_t i = 0; i < positions; ++i) {
            double along = 0;
            for (int64_t a = 0; a < d; ++a) {
                for (int64_t e = 0; e < d; ++e) {
                    at(out, e, i) += scale * at(context, a, e) * at(p, a, i);
                    at(dq, a, i) += scale * at(context, a, e) * at(dout, e, i);
                }
                along += at(p, a, i) * at(dq, a, i);
            }
            for (int64_t a = 0; a < d; ++a) at(dq, a, i) = at(p, a, i) * (at(dq, a, i) - along);
        }
        for (int64_t a = 0; a < d; ++a) {
            double along = 0;
            for (int64_t i = 0; i < keys; ++i) {
                for (int64_t e = 0; e < d; ++e) {
                    at(dk, a, i) += at(dcontext, a, e) * at(v, e, i);
                    at(dv, e, i) += at(dcontext, a, e) * at(w, a, i);
                }
                along += at(w, a, i) * at(dk, a, i);
            }
            for (int64_t i = 0; i < keys; ++i) at(dk, a, i) = at(w, a, i) * (at(dk, a, i) - along);
        }
    }
};

// Inputs are of the size of 1, weights sum up to 1, and sums of products over the positions are in blocks: some
// roundings of the largest term's size a sum, times the number of terms' square root, are what float32 may lose.
double allowed(double largest, int64_t terms) {
    return 0x1p-24 * 24 * (largest + 1e-3) * (1 + std::sqrt(static_cast<double>(terms)) / 8);
}

void check(double actual, double expected, double error, DType dtype, const char* name, const LinearAttentionCase& of) {
    const double unit = dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0;
    const double smallest = dtype == DType::f16 ? 0x1p-25 : 0;
    CHECK(std::fabs(actual - expected) <= error + unit * (std::fabs(expected) + error) + smallest, name, ": ", actual,
          " for ", expected, " +- ", error, ", ", of.describe());
}

double largest(const Matrix& m) {
    double most = 0;
    for (const auto& row : m)
        for (const double value : row) most = std::max(most, std::fabs(value));
    return most;
}

void check_case(const LinearAttentionCase& of) {
    const LinearAttentionShape& shape = of.shape;
    Matrix of_keys = matrix(shape.heads * shape.channels, shape.remembered), of_values = of_keys;
    double bound = 0;
    for (int64_t n = 0; n < shape.samples; ++n)
        for (int64_t h = 0; h < shape.heads; ++h) {
            Exact exact(of, n, h);
            const int64_t terms = shape.positions + shape.channels;
            const double out = allowed(largest(exact.out), terms), dq = allowed(largest(exact.dq) + 1, terms);
            const double dk = allowed(largest(exact.dk) + largest(exact.dv), terms);
            bound += dk;
            for (int64_t c = 0; c < shape.channels; ++c) {
                for (int64_t i = 0; i < shape.positions; ++i) {
                    const auto gradient = [&](int64_t part) {
                        return of.dqkv.buffer.get(of.dqkv.index(n, h, c, i, part, shape.heads));
                    };
                    const int64_t key = shape.remembered + i;
                    check(of.out.buffer.get(of.out.index(n, h, c, i)), Exact::at(exact.out, c, i), out, of.dtype, "out",
                          of);
                    check(gradient(0), Exact::at(exact.dq, c, i), dq, of.dtype, "dq", of);
                    check(gradient(1), Exact::at(exact.dk, c, key), dk, of.dtype, "dk", of);
                    check(gradient(2), Exact::at(exact.dv, c, key), dk, of.dtype, "dv", of);
                }
                for (int64_t i = 0; i < shape.remembered; ++i) {
                    Exact::at(of_keys, h * shape.channels + c, i) += Exact::at(exact.dk, c, i);
                    Exact::at(of_values, h * shape.channels + c, i) += Exact::at(exact.dv, c, i);
                }
            }
        }
    const int64_t rows = shape.heads * shape.channels;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < shape.remembered; ++i) {
            const auto gradient = [&](int64_t half) {
                return of.dmemory.get((half * rows + row) * shape.remembered + i);
            };
            check(gradient(0), Exact::at(of_keys, row, i), bound, DType::f32, "d memory's keys", of);
            check(gradient(1), Exact::at(of_values, row, i), bound, DType::f32, "d memory's values", of);
        }
}

}  // namespace

// One channel and one position; channels that no four divides; a last vector of every length; more positions than a
// block, and more blocks than units; more of the memory than a block.
TEST(linear_attention, is_the_formula_and_its_derivative) {
    Random random(20);
    std::vector<LinearAttentionShape> shapes = {{2, 1, 1, 1, 0},   {2, 3, 5, 7, 3},    {1, 2, 32, 300, 4},
                                                {1, 1, 70, 65, 1}, {1, 1, 8, 8300, 2}, {1, 2, 3, 5, 600}};
    for (int64_t size = 1; size <= 33; ++size) {
        shapes.push_back({1, 2, 3, size, 2});
        shapes.push_back({2, 1, size, 3, 0});
    }
    for (const LinearAttentionShape& shape : shapes)
        for (const HeadsOrder order : kHeadsOrders)
            for (const DType dtype : kFloat32AndBelow) {
                const LinearAttentionCase attention(shape, dtype, order, random);
                linear_attention(attention.forward_args(1));
                linear_attention_backward(attention.backward_args(1));
                check_case(attention);
            }
}

}  // namespace diffkern::tests
