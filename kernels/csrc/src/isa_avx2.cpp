#define LUTHIER_LANES 8
#define LUTHIER_VECTORS 2
#define LUTHIER_REGISTERS 16
#define LUTHIER_KERNELS kernels_avx2
#define LUTHIER_BFLOAT16 FloatPath<uint16_t>
#include "all.inl"
