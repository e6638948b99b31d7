// SF_HD marks a function that host and device share; the host compiler sees a plain inline function.
#pragma once

#if defined(__CUDACC__)
#define SF_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SF_HD inline __attribute__((always_inline))
#else
#define SF_HD inline
#endif
