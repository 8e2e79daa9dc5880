# Makes OUTPUT, the pack that a wheel brings, by PROGRAM: kernels for ARCH, those that FLAGS select. PREFIX is of the Python
# whose packages may hold NVRTC.
separate_arguments(selection UNIX_COMMAND "${FLAGS}")
set(ENV{VIRTUAL_ENV} "${PREFIX}")
# Only its own kernels: what an earlier build left is not added to.
set(new "${OUTPUT}.new.zip")
file(REMOVE "${new}" "${OUTPUT}")
# A wheel goes to machines whose drivers are not known: every driver for CUDA 12 and newer loads what NVRTC 12 makes.
execute_process(COMMAND "${PROGRAM}" prebuild --arch "${ARCH}" ${selection} --driver 12.0 --out "${new}"
                RESULT_VARIABLE code)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "The kernels that FLASH_ATTN_JIT_BUNDLE asks for could not be built; the reason stands above. An "
                      "NVRTC 12.x is needed on the machine that builds: pip install 'nvidia-cuda-nvrtc-cu12>=12,<13', "
                      "or FLASH_ATTN_JIT_NVRTC names one. Without FLASH_ATTN_JIT_BUNDLE nothing is bundled.")
endif()
file(RENAME "${new}" "${OUTPUT}")
