"""Fast paths of the codec, each bit-equal to the numpy reference in `protocol`; `peer.core.codec` picks among them.

kernels.cpp is one plain C++ file, built by setup.py and called through native.py.
"""
