// Recurrences whose units do not see each other (cells/elementwise.h), forward and backward.
//
// A column is one vector of units of one row, and no column waits for another: a thread owns its columns for
// the whole sequence, without a barrier. Each value of wx is read once and each of y written once, with few
// operations between, so memory must not be waited for longer than its bandwidth asks. Hence a thread takes a
// block of columns whose state and u stay in the core's own cache over all steps, and walks through the block
// within each step: neighbouring columns are neighbours in memory, so wx is read in long runs, which the
// hardware fetches ahead, and the columns hide each other's latency. One column at a time, with its state in
// registers, took two to eight times as long from memory: each of its steps is on another page, and waits for
// the step before.
#pragma once

#include <cstring>

#include "cells/elementwise.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "cpu/tile.h"
#include "scan_params.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Bytes of one state of a block of columns. There are h, c, up to four of u, and in backward four of du.
constexpr int64_t kScanBlockBytes = 8192;

// Calls each(row, units) for the parts of rows that are in a range of columns.
template <typename V, typename Each>
RNN_FN void for_rows(int64_t units, Range columns, const Each& each) {
  const int64_t per_row = ceil_div(units, V::kSize);
  for (int64_t b = columns.begin / per_row, first = b * per_row; first < columns.end; ++b, first += per_row) {
    const int64_t begin = max64(columns.begin - first, 0), end = min64(columns.end - first, per_row);
    each(b, Range{begin * V::kSize, min64(end * V::kSize, units)});
  }
}

// Calls run(p, columns) for all columns of a call, block by block, on a team of threads.
template <typename T, typename P, void (*run)(const P& p, Range columns)>
void run_blocks(const P& p, int64_t batch, int64_t units, int threads, cpu::RunTeam run_team) {
  constexpr int64_t kBlock = kScanBlockBytes / RNN_VECTOR_BYTES;
  const int64_t columns = batch * ceil_div(units, kLanes<T>);
  struct Work {
    const P& p;
    int64_t at_once;
    Shares columns;
  } work{p, max64(1, min64(kBlock, ceil_div(columns, threads))), Shares(columns)};
  run_team(
      int(min64(threads, max64(columns, 1))),
      [](void* context, int) {
        const FlushDenormals flush;
        Work& w = *static_cast<Work*>(context);
        w.columns.take(w.at_once, [&](Range part) { run(w.p, part); });
      },
      &work);
}

template <typename T>
int64_t scan_length(const ScanParams<T>& p, int64_t b) {
  return p.lengths == nullptr ? p.steps : p.lengths[b];
}

// Part of a row of an array [..., U] from `from`, or zeros.
template <typename T>
void copy_units(T* to, const T* from, Range units) {
  const size_t bytes = (units.end - units.begin) * sizeof(T);
  if (from == nullptr)
    memset(to + units.begin, 0, bytes);
  else
    memcpy(to + units.begin, from + units.begin, bytes);
}

// base + offset, or null if base is.
template <typename T>
RNN_FN T* row_of(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

template <typename V, typename T, int G, typename Lanes>
RNN_FN void load_gates(V (&out)[G], const T* from, int64_t stride, Lanes lanes) {
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) out[g] = V::load(from + g * stride, lanes);
}

// A state times its mask, if it has one.
template <typename V, typename T, typename Lanes>
RNN_FN V masked(V state, const T* mask, Lanes lanes) {
  return mask == nullptr ? state : state * V::load(mask, lanes);
}

template <typename T, template <typename, typename> class CellOf, typename Act>
struct Scan {
  using V = VecOf<T>;
  using C = CellOf<V, Act>;
  using State = elementwise::State<V>;
  using Params = ScanParams<T>;
  using Backward = ScanBackwardParams<T>;
  static constexpr int G = C::kGates;

  // Step t of a part of row b; the state is in h_n and c_n.
  __attribute__((noinline)) static void forward_step(const Params& p, int64_t t, int64_t b, Range units) {
    const int64_t U = p.units, row = b * U, place = t * p.batch * U + row;
    const T* wx = p.wx + t * p.wx_stride_t + b * p.wx_stride_b;
    const T* mask_h = row_of(p.mask_h, t * p.mask_h_stride_t + row);
    const T* mask_c = row_of(p.mask_c, t * p.mask_c_stride_t + row);
    T *y = p.y + place, *tape = row_of(p.tape, place);
    T *h = row_of(p.h_n, row), *c = row_of(p.c_n, row);
    for (int64_t i = units.begin; i < units.end; i += V::kSize) {
      V::with_lanes(units.end - i, [&](auto lanes) {
        V sums[G], u[G];
        State prev{V(T(0)), V(T(0))};
        load_gates(sums, wx + i, U, lanes);
        if constexpr (C::kCarriesH) load_gates(u, p.u + i, U, lanes), prev.h = V::load(h + i, lanes);
        if constexpr (C::kCarriesC) prev.c = V::load(c + i, lanes);
        const State next = C::forward(sums, u, prev);
        next.h.store(y + i, lanes);
        if constexpr (C::kCarriesH) masked(next.h, row_of(mask_h, i), lanes).store(h + i, lanes);
        if constexpr (C::kCarriesC) {
          if (tape != nullptr) next.c.store(tape + i, lanes);
          masked(next.c, row_of(mask_c, i), lanes).store(c + i, lanes);
        }
      });
    }
  }

  static void forward(const Params& p, Range columns) {
    for_rows<V>(p.units, columns, [&](int64_t b, Range units) {
      const int64_t row = b * p.units;
      if constexpr (C::kCarriesH) copy_units(p.h_n + row, row_of(p.h0, row), units);
      if constexpr (C::kCarriesC) copy_units(p.c_n + row, row_of(p.c0, row), units);
    });
    for (int64_t s = 0; s < p.steps; ++s) {
      for_rows<V>(p.units, columns, [&](int64_t b, Range units) {
        const int64_t length = scan_length(p, b), past = (s * p.batch + b) * p.units;
        if (s < length) return forward_step(p, p.reverse ? length - 1 - s : s, b, units);
        copy_units(p.y + past, static_cast<const T*>(nullptr), units);
        if (p.tape != nullptr) copy_units(p.tape + past, static_cast<const T*>(nullptr), units);
      });
    }
  }

  // Step t of a part of row b, after step `before`, or as the row's first if that is negative. The gradients
  // by the carried state are in dh0 and dc0.
  __attribute__((noinline)) static void backward_step(const Backward& q, int64_t t, int64_t before, int64_t b,
                                                      Range units) {
    const Params& p = q.scan;
    const int64_t U = p.units, row = b * U, step = p.batch * U;
    const bool first = before < 0;
    const T* wx = p.wx + t * p.wx_stride_t + b * p.wx_stride_b;
    const T* y = p.y + t * step + row;
    const T* dy = row_of(q.dy, t * q.dy_stride_t + b * q.dy_stride_b);
    const T* h_prev = first ? row_of(p.h0, row) : p.y + before * step + row;
    const T* c_prev = first ? row_of(p.c0, row) : row_of(p.tape, before * step + row);
    const T* mask_h_prev = first ? nullptr : row_of(p.mask_h, before * p.mask_h_stride_t + row);
    const T* mask_c_prev = first ? nullptr : row_of(p.mask_c, before * p.mask_c_stride_t + row);
    const T* mask_h = row_of(p.mask_h, t * p.mask_h_stride_t + row);
    const T* mask_c = row_of(p.mask_c, t * p.mask_c_stride_t + row);
    T* dwx = q.dwx + (t * step + row) * G;
    T *du_row = row_of(q.du_rows, row * G), *dh0 = row_of(q.dh0, row), *dc0 = row_of(q.dc0, row);
    const auto load = [](const T* from, int64_t i, auto lanes) {
      return from == nullptr ? V(T(0)) : V::load(from + i, lanes);
    };
    for (int64_t i = units.begin; i < units.end; i += V::kSize) {
      V::with_lanes(units.end - i, [&](auto lanes) {
        const V zero(T(0));
        V sums[G], u[G], d[G], du[G], h = zero;
        State prev{zero, zero}, dnext{load(dy, i, lanes), zero};
        load_gates(sums, wx + i, U, lanes);
        if constexpr (C::kCarriesH) {
          load_gates(u, p.u + i, U, lanes);
          h = V::load(y + i, lanes);
          prev.h = masked(load(h_prev, i, lanes), row_of(mask_h_prev, i), lanes);
          dnext.h += masked(V::load(dh0 + i, lanes), row_of(mask_h, i), lanes);
        }
        if constexpr (C::kCarriesC) {
          prev.c = masked(load(c_prev, i, lanes), row_of(mask_c_prev, i), lanes);
          dnext.c = masked(V::load(dc0 + i, lanes), row_of(mask_c, i), lanes);
        }
        const State dprev = C::backward(sums, u, prev, h, dnext, d, du);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) d[g].store(dwx + g * U + i, lanes);
        if constexpr (C::kCarriesH) {
          dprev.h.store(dh0 + i, lanes);
          if (du_row != nullptr) {
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g)
              (V::load(du_row + g * U + i, lanes) + du[g]).store(du_row + g * U + i, lanes);
          }
        }
        if constexpr (C::kCarriesC) dprev.c.store(dc0 + i, lanes);
      });
    }
  }

  static void backward(const Backward& q, Range columns) {
    const Params& p = q.scan;
    const T* none = nullptr;
    for_rows<V>(p.units, columns, [&](int64_t b, Range units) {
      const int64_t row = b * p.units;
      if constexpr (C::kCarriesH) copy_units(q.dh0 + row, row_of(q.dh_n, row), units);
      if constexpr (C::kCarriesC) copy_units(q.dc0 + row, row_of(q.dc_n, row), units);
      for (int g = 0; q.du_rows != nullptr && g < G; ++g)
        copy_units(q.du_rows + row * G + g * p.units, none, units);
    });
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      for_rows<V>(p.units, columns, [&](int64_t b, Range units) {
        const int64_t length = scan_length(p, b);
        if (s < length) {
          const int64_t t = p.reverse ? length - 1 - s : s;
          return backward_step(q, t, s == 0 ? -1 : p.reverse ? t + 1 : t - 1, b, units);
        }
        for (int g = 0; g < G; ++g) copy_units(q.dwx + ((s * p.batch + b) * G + g) * p.units, none, units);
      });
    }
  }

  // du is the sum of the rows' parts, in their order: the same to the bit on any number of threads.
  static void sum_rows(const Backward& q, Range columns) {
    for_rows<V>(G * q.scan.units, columns, [&](int64_t, Range units) {
      copy_units(q.du, static_cast<const T*>(nullptr), units);
      for (int64_t b = 0; b < q.scan.batch; ++b)
        for (int64_t i = units.begin; i < units.end; i += V::kSize)
          V::with_lanes(units.end - i, [&](auto lanes) {
            const V part = V::load(q.du_rows + b * G * q.scan.units + i, lanes);
            (V::load(q.du + i, lanes) + part).store(q.du + i, lanes);
          });
    });
  }

  static void run(const Params& p, int threads, cpu::RunTeam run_team) {
    run_blocks<T, Params, forward>(p, p.batch, p.units, threads, run_team);
  }

  static void run(const Backward& q, int threads, cpu::RunTeam run_team) {
    const Params& p = q.scan;
    run_blocks<T, Backward, backward>(q, p.batch, p.units, threads, run_team);
    // Without rows, too, it is written: as zeros.
    if (q.du != nullptr) run_blocks<T, Backward, sum_rows>(q, 1, G * p.units, threads, run_team);
  }
};

template <typename T, template <typename, typename> class CellOf, typename P>
void run_scan(Activation activation, const P& p, int threads, cpu::RunTeam run_team) {
  switch (activation) {
    case Activation::kTanh:
      return Scan<T, CellOf, elementwise::Tanh>::run(p, threads, run_team);
    case Activation::kRelu:
      return Scan<T, CellOf, elementwise::Relu>::run(p, threads, run_team);
    case Activation::kSigmoid:
      return Scan<T, CellOf, elementwise::Sigmoid>::run(p, threads, run_team);
    case Activation::kIdentity:
      return Scan<T, CellOf, elementwise::Identity>::run(p, threads, run_team);
  }
}

template <typename T, typename P>
void run_scan(const ScanParams<T>& scan, const P& p, int threads, cpu::RunTeam run_team) {
  switch (scan.cell) {
    case ScanCell::kIndRnn:
      return run_scan<T, elementwise::IndRnn>(scan.activation, p, threads, run_team);
    case ScanCell::kIndyGru:
      return run_scan<T, elementwise::IndyGru>(scan.activation, p, threads, run_team);
    case ScanCell::kIndyLstm:
      return run_scan<T, elementwise::IndyLstm>(scan.activation, p, threads, run_team);
    case ScanCell::kSru:
      return run_scan<T, elementwise::Sru>(scan.activation, p, threads, run_team);
  }
}

template <typename T>
void scan_forward(const ScanParams<T>& p, int threads, cpu::RunTeam run_team) {
  run_scan(p, p, threads, run_team);
}

template <typename T>
void scan_backward(const ScanBackwardParams<T>& q, int threads, cpu::RunTeam run_team) {
  run_scan(q.scan, q, threads, run_team);
}

}  // namespace RNN_ISA
}  // namespace torchrnn
