"""The optimizers' kernels compute what they always did: digests made on a CPU, compared on whatever is here."""

from __future__ import annotations

import json

import golden
import pytest
from support import ISAS, threads

DIGESTS = json.loads(golden.FILE.read_text())


def test_every_case_has_a_digest_of_its_own():
    assert DIGESTS.keys() == golden.CASES.keys()
    assert len(set(DIGESTS.values())) == len(DIGESTS)


@pytest.mark.parametrize("name", golden.CASES)
def test_the_cpu_kernel_computes_what_it_did(name):
    assert golden.digest(name, "cpu", "cpu") == DIGESTS[name]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in golden.CASES if name.count(" ") == 2])
def test_every_instruction_set_computes_what_the_best_does(name, isa):
    with threads(1):
        assert golden.digest(name, "cpu", f"cpu:{isa}") == DIGESTS[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", golden.CASES)
def test_the_gpu_kernels_compute_what_the_cpu_does(name, backend):
    assert golden.digest(name, "cuda", backend) == DIGESTS[name]
