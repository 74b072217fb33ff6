// Two neighbouring order statistics of non-negative numbers, exactly: their bits, read as integers, are in the order of
// the numbers, with NaN last. Bisects the integers by counting how many are below, in full vectors and without a branch
// in the loop, until few are left; some ten passes over a sample that lies in the first or second cache.
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class Real>
struct BitsOf;
template <>
struct BitsOf<float> {
    using type = int32_t;
    using vector = i32v;
};
template <>
struct BitsOf<double> {
    using type = int64_t;
    using vector = i64v;
};

template <class Real>
struct Neighbours {
    Real lower, upper;
};

// Numbers of which every sign bit is clear, with room for whole vectors.
template <class Real>
class OrderStatistics {
    using Bits = typename BitsOf<Real>::type;
    using V = typename BitsOf<Real>::vector;

 public:
    // `values` has room for `padded(count)`.
    OrderStatistics(Real* values, int64_t count) : values_(values), count_(count) {
        const Bits last = kLast;
        for (int64_t i = count; i < padded(count); ++i) __builtin_memcpy(values + i, &last, sizeof last);
    }

    static constexpr int64_t padded(int64_t count) {
        return (count + kLanes - 1) / kLanes * kLanes;
    }

    // The values number k and k + 1 from below, 0 <= k < count; the last one twice where there is no other.
    Neighbours<Real> at(int64_t k) const {
        Bits low = 0, high = kLast;  // number k lies in [low, high], `below` numbers are less than low
        int64_t below = 0, inside = count_;
        while (inside > kFew && low < high) {
            const Bits middle = low + (high - low) / 2 + 1;
            const int64_t below_middle = count_below(middle);
            if (k < below_middle) {
                high = middle - 1;
                inside = below_middle - below;
            } else {
                low = middle;
                inside -= below_middle - below;
                below = below_middle;
            }
        }
        const int64_t rank = k - below;
        const bool upper_inside = rank + 1 < inside;
        Neighbours<Real> found;
        if (low == high) {
            found.lower = found.upper = real(low);
        } else {
            Bits few[kFew + kLanes];
            sort_inside(low, high, few);
            found.lower = real(few[rank]);
            found.upper = real(few[upper_inside ? rank + 1 : rank]);
        }
        if (!upper_inside && k + 1 < count_) found.upper = real(least_above(high));
        return found;
    }

 private:
    static constexpr int64_t kFew = 32;
    static constexpr Bits kLast = static_cast<Bits>(~(uint64_t{1} << 63) >> (64 - 8 * sizeof(Bits)));

    static Real real(Bits bits) {
        Real value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
    DIFFKERN_INLINE V bits(int64_t i) const {
        V v;
        __builtin_memcpy(&v, values_ + i, sizeof v);
        return v;
    }

    int64_t count_below(Bits limit) const {
        V counts[4] = {};
        const int64_t end = padded(count_);
        int64_t i = 0;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int u = 0; u < 4; ++u) counts[u] -= bits(i + u * kLanes) < limit;
        for (; i < end; i += kLanes) counts[0] -= bits(i) < limit;
        int64_t total = 0;
        for (const V& count : counts)
            for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
        return total;
    }

    // The numbers in [low, high], of which there are kFew at most but for what fills up the last vector.
    void sort_inside(Bits low, Bits high, Bits* few) const {
        int64_t size = 0;
        for (int64_t i = 0; i < padded(count_); i += kLanes) {
            const V v = bits(i), outside = (v < low) | (v > high);
            for (int lane = 0; lane < kLanes; ++lane) {
                if (outside[lane]) continue;
                int64_t place = size++;
                for (; place > 0 && few[place - 1] > v[lane]; --place) few[place] = few[place - 1];
                few[place] = v[lane];
            }
        }
    }

    Bits least_above(Bits limit) const {
        V least = V{} + kLast;
        for (int64_t i = 0; i < padded(count_); i += kLanes) {
            const V v = bits(i);
            least = (v > limit) & (v < least) ? v : least;
        }
        Bits found = kLast;
        for (int lane = 0; lane < kLanes; ++lane) found = least[lane] < found ? least[lane] : found;
        return found;
    }

    const Real* values_;
    int64_t count_;
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
