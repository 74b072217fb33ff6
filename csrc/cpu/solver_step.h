#pragma once

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/operand.h"

namespace diffkern {

constexpr int kMaxSlots = 8;

// The columns of a StepProgram's coefficients (diffkern/solvers/program.py): the fixed ones, then c_h per slot, then
// two blocks [g_x, g_m, g_0, g_h per slot], one for each slot that a row may write.
enum Column : int { kAx, kAm, kCx, kCm, kC0, kCz, kCe, kCv, kScale, kLogVarMin, kLogVarMax, kFixedColumns };

enum class Variance : int { fixed = 0, learned = 1, learned_range = 2 };

struct SolverStepArgs {
    SampleShape shape;
    Operand x, uncond, cond, var, extra, noise;  // null where the call has none; without guidance only `uncond`
    NoiseArgs source;                            // its draw is the row
    const double* table;                         // (rows, columns)
    int64_t num_columns;
    const int64_t* writes;  // (rows, 2), -1 for none
    const int64_t* row;     // one, or one per sample
    bool row_per_sample;
    const double* guidance_scale;  // one or one per sample, with `cond`
    bool guidance_per_sample;
    const double* guidance_rescale;  // r_n per sample, or null
    const double* threshold;         // s_n per sample, or null
    bool clip;
    double clip_low, clip_high;
    Variance variance;
    Operand slots[kMaxSlots];  // h_k: read, and written if the row says so
    int num_slots;
    Operand out;
    Operand x_in;  // null unless the program scales its input
    int num_threads;
};

DIFFKERN_DISPATCH(solver_step, SolverStepArgs)

}  // namespace diffkern
