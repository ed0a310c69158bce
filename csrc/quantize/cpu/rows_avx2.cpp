#include "quantize/cpu/kernel.h"

namespace torch_sage {

const RowKernels kRowKernelsAvx2 = kKernels;

}  // namespace torch_sage
