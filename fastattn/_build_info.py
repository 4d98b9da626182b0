"""Written by setup.py: what the install built."""

CPU_ISAS = ['baseline', 'avx2', 'avx512', 'avx512bf16']
REASON = ''
COMPILER = 'g++ -Wsign-compare -DNDEBUG -g -fwrapv -O3 -Wall'
