// What tests ask of the emulator.
#include <torch/csrc/stable/library.h>

#include "simt.h"

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_emulate, m) {
  m.def("launches() -> int");
  m.def("loads() -> int[]");
  m.def("record(int multiprocessors, int shared_limit) -> ()");
  m.def("recorded() -> int[]");
  m.def("set_order(int order) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_emulate, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&bigain::simt::launches));
  m.impl("loads", TORCH_BOX(&bigain::simt::loads));
  m.impl("record", TORCH_BOX(&bigain::simt::record));
  m.impl("recorded", TORCH_BOX(&bigain::simt::recorded));
  m.impl("set_order", TORCH_BOX(&bigain::simt::set_order));
}
