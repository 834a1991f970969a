#!/bin/sh
# Prints where a header or library of CUDA is: the first file whose name begins with the argument,
# in the toolkit (CUDA_HOME), among the system's packages, or in the packages that PyTorch's wheels
# bring (nvidia/*/include and lib). A library is first looked for beside its header, so that the two
# have one version. Prints nothing and fails if there is none.
#
#     sh dev/find_cuda.sh cublasLt.h
#     sh dev/find_cuda.sh libcublasLt.so cublasLt.h       the library, best the one of this header
#
# PYTHON=python3: whose packages are searched.
[ $# -ge 1 ] || { sed -n '2,$s/^# \{0,1\}//p' "$0" >&2; exit 2; }
home=${CUDA_HOME:-/usr/local/cuda}

packages() {
    "${PYTHON:-python3}" -c '
import site, sysconfig
for path in [sysconfig.get_paths()["purelib"], site.getusersitepackages()]: print(path)' 2>/dev/null
}

first() {                                                # name, directories
    name=$1
    shift
    for dir; do
        for file in "$dir/$name"*; do [ -f "$file" ] && echo "$file" && return; done
    done
    return 1
}

anywhere() {                                             # name
    first "$1" "$home/include" "$home/lib64" "$home"/targets/*/include "$home"/targets/*/lib \
        /usr/include /usr/lib/*-linux-gnu /usr/lib64 /usr/local/include /usr/local/lib && return
    packages | while read -r site; do
        first "$1" "$site"/nvidia/*/include "$site"/nvidia/*/lib && break
    done | grep .
}

if [ $# -eq 2 ]; then
    header=$(anywhere "$2") && root=$(dirname "$(dirname "$header")") &&
        first "$1" "$root/lib64" "$root/lib" && exit
fi
anywhere "$1"
