#pragma once

// Who defines the schemas of torch_sage:: in this process: the Python package, or the library for
// processes without it (standalone/). Both ask, whichever loads first; the dispatcher would end the
// process at a second definition.
//
// Returns whether the caller is the first to ask.
extern "C" __attribute__((visibility("default"))) bool torch_sage_claim_schemas() noexcept;
