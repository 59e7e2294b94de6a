# cmake -DNVCC=... -DARCH=90a [-DCUOBJDUMP=...] -DSOURCE=... -DOUTPUT=... -P device_code_test.cmake
#
# The source compiles without a warning; its machine code has the instructions that it names.
foreach(kind -c -cubin)
  execute_process(
    COMMAND "${NVCC}" -std=c++20 -gencode=arch=compute_${ARCH},code=sm_${ARCH} --Werror all-warnings ${kind} "${SOURCE}"
            -o "${OUTPUT}${kind}" RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "nvcc failed for sm_${ARCH}")
  endif()
endforeach()
if(CUOBJDUMP)
  execute_process(COMMAND "${CUOBJDUMP}" -sass "${OUTPUT}-cubin" OUTPUT_VARIABLE sass COMMAND_ERROR_IS_FATAL ANY)
  foreach(instruction LDGSTS.E.BYPASS.128 LDGDEPBAR LDSM.16.M88.4 LDSM.16.M88.2 LDSM.16.MT88.4 HMMA.16816.F32
                      HMMA.16816.F32.BF16 HMMA.1688.F32.TF32 LDG.E.128 STG.E.128 SHFL.BFLY)
    string(FIND "${sass}" "${instruction}" at)
    if(at EQUAL -1)
      message(FATAL_ERROR "sm_${ARCH}: no ${instruction}")
    endif()
  endforeach()
endif()
