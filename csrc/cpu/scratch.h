// Memory of a task, without values to begin with.
#pragma once

#include "cpu/vec.h"

namespace diffkern {
namespace DIFFKERN_ISA {

template <class T>
class Scratch {
 public:
    explicit Scratch(int64_t size) : data_(size > 0 ? new T[static_cast<unsigned long>(size)] : nullptr) {
    }
    ~Scratch() {
        delete[] data_;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() {
        return data_;
    }

 private:
    T* data_;
};

}  // namespace DIFFKERN_ISA
}  // namespace diffkern
