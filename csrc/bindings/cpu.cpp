// The Python module diffkern._cpu: the CPU kernels over raw addresses, sizes and strides, no torch. One file an op
// beside this one; what the tuples hold stands in convert.h.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/mt19937.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace diffkern;

#if defined(__clang__)
#define DIFFKERN_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define DIFFKERN_COMPILER "GCC " __VERSION__
#else
#define DIFFKERN_COMPILER "unknown"
#endif

namespace diffkern {
void bind_philox(py::module_&);
void bind_q_sample(py::module_&);
void bind_solver_step(py::module_&);
void bind_guidance_rescale(py::module_&);
void bind_dynamic_threshold(py::module_&);
void bind_group_norm(py::module_&);
void bind_group_norm_eager(py::module_&);
void bind_channel_rms_norm(py::module_&);
void bind_attention(py::module_&);
void bind_linear_attention(py::module_&);
void bind_recycled(py::module_&);
void bind_tensor(py::module_&);
void bind_diffusion_loss(py::module_&);
void bind_vb_terms(py::module_&);
}  // namespace diffkern

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "diffkern's CPU kernels over raw pointers; see diffkern.ops for the public functions";
    choose_isa(std::getenv("DIFFKERN_CPU"));
    m.attr("isa") = isa_name(chosen_isa());
    py::list isas;
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (isa <= best_isa()) isas.append(isa_name(isa));
    }
    m.attr("isas") = py::tuple(isas);  // what this processor and this build both have
    m.attr("compiler") = DIFFKERN_COMPILER;
    m.def(
        "set_parallel", [](std::uintptr_t address) { set_parallel(reinterpret_cast<ParallelFn>(address)); },
        py::arg("address"), "The address of GOMP_parallel in the OpenMP runtime that torch uses; 0 runs serially.");
    m.def("has_parallel", &has_parallel);
    m.def(
        "run_in_team",
        [](const py::function& function, int count) {
            auto body = [&](int64_t task) {
                const py::gil_scoped_acquire acquire;
                try {
                    function(task);
                } catch (py::error_already_set& error) {  // must not leave the runtime's thread
                    error.discard_as_unraisable("diffkern._cpu.run_in_team");
                }
            };
            const py::gil_scoped_release release;
            parallel_for(count, count, body);
        },
        py::arg("function"), py::arg("count"),
        "Calls function(0 .. count - 1), which must not raise, on the threads that kernels run on.");
    m.def(
        "advise_huge_pages",
        [](std::uintptr_t address, int64_t bytes) { advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
        py::arg("address"), py::arg("bytes"), "For a large output that is about to be written whole.");
    m.attr("torch_generator_bytes") = kTorchGeneratorBytes;
    m.def(
        "advance_torch_generator",
        [](std::uintptr_t state, int64_t count) { advance_torch_generator(reinterpret_cast<char*>(state), count); },
        py::arg("state"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
        "Moves the bytes of torch.Generator.get_state() at an address past `count` 32-bit numbers.");
    bind_philox(m);
    bind_q_sample(m);
    bind_solver_step(m);
    bind_guidance_rescale(m);
    bind_dynamic_threshold(m);
    bind_group_norm(m);
    bind_group_norm_eager(m);
    bind_channel_rms_norm(m);
    bind_attention(m);
    bind_linear_attention(m);
    bind_recycled(m);
    bind_tensor(m);
    bind_diffusion_loss(m);
    bind_vb_terms(m);
}
