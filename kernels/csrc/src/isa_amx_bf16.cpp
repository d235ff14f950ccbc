#define LUTHIER_LANES 16
#define LUTHIER_VECTORS 4
#define LUTHIER_REGISTERS 32
#define LUTHIER_KERNELS kernels_amx_bf16
#define LUTHIER_BFLOAT16 TilePath
#include "all.inl"
