// Memory of exactly the elements a kernel may touch, so that AddressSanitizer sees the first byte beside them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "common/dtype.h"
#include "cpu/operand.h"
#include "tests/check.h"

namespace diffkern::tests {

constexpr DType kDtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
constexpr DType kFloat32AndBelow[] = {DType::f32, DType::bf16, DType::f16};

inline const char* name_of(DType dtype) {
    return dtype == DType::f64 ? "float64" : dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bf16" : "f16";
}

// `count` elements that start `offset` elements into their allocation and end with it. NaN to begin with: an output
// that is not written and an input that should not be read both show.
class Buffer {
 public:
    explicit Buffer(DType dtype, int64_t count, int64_t offset = 0)
        : dtype_(dtype), count_(count), offset_(offset), memory_(static_cast<char*>(std::malloc(bytes()))) {
        for (int64_t i = -offset_; i < count_; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
    }
    Buffer(const Buffer& other) : Buffer(other.dtype_, other.count_, other.offset_) {
        std::memcpy(memory_, other.memory_, bytes());
    }
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        std::free(memory_);
    }

    DType dtype() const {
        return dtype_;
    }
    int64_t count() const {
        return count_;
    }
    char* data() const {
        return memory_ + offset_ * size_of(dtype_);
    }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data());
    }
    Operand operand(int64_t sample_stride) const {
        return {data(), dtype_, sample_stride};
    }

    double get(int64_t i) const {
        switch (dtype_) {
            case DType::f64: return as<double>()[i];
            case DType::bf16: return static_cast<double>(to_float(as<bf16>()[i]));
            case DType::f16: return static_cast<double>(to_float(as<f16>()[i]));
            default: return static_cast<double>(as<float>()[i]);
        }
    }
    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::f64: as<double>()[i] = value; break;
            case DType::bf16: as<bf16>()[i] = to_bf16(static_cast<float>(value)); break;
            case DType::f16: as<f16>()[i] = to_f16(static_cast<float>(value)); break;
            default: as<float>()[i] = static_cast<float>(value);
        }
    }

    bool same_bits(const Buffer& other) const {
        return bytes() == other.bytes() && std::memcmp(memory_, other.memory_, bytes()) == 0;
    }

 private:
    size_t bytes() const {
        return static_cast<size_t>((offset_ + count_) * size_of(dtype_));
    }

    DType dtype_;
    int64_t count_, offset_;
    char* memory_;
};

class Random {
 public:
    explicit Random(uint64_t seed) : engine_(seed) {
    }
    uint64_t word() {
        return engine_();
    }
    // Uniform in [low, high).
    double real(double low, double high) {
        return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
    }
    int64_t below(int64_t limit) {
        return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit));
    }
    bool coin() {
        return below(2) != 0;
    }
    void fill(Buffer& buffer, double low, double high) {
        for (int64_t i = 0; i < buffer.count(); ++i) buffer.set(i, real(low, high));
    }

 private:
    std::mt19937_64 engine_;
};

}  // namespace diffkern::tests
