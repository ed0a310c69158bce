#include "quantize/cpu/kernel.h"

namespace torch_sage {

const RowKernels kRowKernelsAvx512 = kKernels;

}  // namespace torch_sage
