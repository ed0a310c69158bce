#include "quantize/cpu/kernel.h"

namespace torch_sage {

const RowKernels kRowKernelsPortable = kKernels;

}  // namespace torch_sage
