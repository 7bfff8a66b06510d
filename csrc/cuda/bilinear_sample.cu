#include "bilinear_sample.h"

#include "rows.cuh"

namespace vitup::cuda {

void run(const BilinearSample& arguments, cudaStream_t stream) { launch_rows(arguments, stream); }
void run(const BilinearSampleCoordsBackward& arguments, cudaStream_t stream) { launch_rows(arguments, stream); }
void run(const BilinearSampleGridBackward& arguments, cudaStream_t stream) { launch_rows(arguments, stream); }

}  // namespace vitup::cuda
