"""The C++ kernels answer every vector about sections like the reference, with every instruction set of this machine."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from peer.core.kernels import native
from peer.core.kernels.native import Native
from protocol.conformance import Case, load
from protocol.errors import ProtocolError

Request = Mapping[str, Any]
INSTRUCTIONS = {"portable": 0, "AVX2": 1, "AVX-512": 2}


@pytest.fixture(params=INSTRUCTIONS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Native]:
    loaded = native.load()
    if loaded is None:
        pytest.skip("the installation built no kernels: no C++ compiler was there")
    if not loaded.use_instructions(INSTRUCTIONS[request.param]):
        pytest.skip(f"this machine has no {request.param}")
    yield loaded
    loaded.use_instructions(-1)


def floats(request: Request, name: str) -> NDArray[np.float32]:
    return np.frombuffer(bytes.fromhex(request[name]), "<f4").astype(np.float32)


def check_section(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    data = bytes.fromhex(request["bytes"])
    return {"count": kernels.check_section(data, request["size"], request["k"], request["code_bits"])}


def check_update_section(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    return {"count": kernels.check_update_section(bytes.fromhex(request["bytes"]), request["size"])}


def acc(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    """With every value kept, the originals of the sent positions are the sum itself, wherever a chunk is present."""
    residual, outer, local = (floats(request, name) for name in ("residual", "outer", "local"))
    _, positions, originals = kernels.compress(residual, outer, local, request["beta"], 4096, 1, threads)
    sums = residual.copy()
    sums[positions] = originals
    return {"acc": sums.astype("<f4").tobytes().hex()}


def compress(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    # beta * -0 + (acc - 0) is acc, the sign of a zero included.
    outer = floats(request, "acc")
    residual, local = np.full_like(outer, -0.0), np.zeros_like(outer)
    section, positions, originals = kernels.compress(
        residual, outer, local, 0.5, request["k"], request["code_bits"], threads
    )
    assert originals.tobytes() == outer[positions].tobytes()
    return {"section": section.hex(), "residual_sha256": hashlib.sha256(residual.tobytes()).hexdigest()}


def merge(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    sections = [bytes.fromhex(section) for section in request["sections"]]
    weights, clips = request["weights"], request["clips"]
    shape = request["size"], request["k"], request["code_bits"]
    total, alpha_q16 = sum(weights), request["alpha_q16"]
    merged = kernels.merge(sections, weights, clips, *shape, request["rule"], total, alpha_q16, threads)
    return {"section": merged.hex()}


def apply(kernels: Native, request: Request, threads: int) -> dict[str, Any]:
    outer = floats(request, "outer")
    kernels.outer_step(outer, bytes.fromhex(request["section"]), threads)
    return {"outer": outer.astype("<f4").tobytes().hex()}


ANSWERS: dict[tuple[str, str], Callable[[Native, Request, int], dict[str, Any]]] = {
    ("check", "section"): check_section,
    ("check", "update-section"): check_update_section,
    ("make", "acc"): acc,
    ("make", "compress"): compress,
    ("make", "merge"): merge,
    ("make", "apply"): apply,
}
CASES = {
    place: [case for case in load() if (case.request["verb"], case.request.get("kind")) == place] for place in ANSWERS
}


def answered(kernels: Native, case: Case, threads: int) -> dict[str, Any]:
    try:
        return {"ok": ANSWERS[case.request["verb"], case.request["kind"]](kernels, case.request, threads)}
    except ProtocolError as error:
        return {"refused": int(error.code)}
    except ValueError:
        return {"refused": 0}


def known_here(case: Case) -> dict[str, Any]:
    """The answer as far as a kernel gives it: it counts values, and refuses a sum that is not finite at once."""
    facts = {name: fact for name, fact in case.expect.get("ok", {}).items() if name != "sha256"}
    if "acc" in facts and not np.isfinite(floats(facts, "acc")).all():
        return {"refused": 0}
    return {"ok": facts} if facts else case.expect


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", ANSWERS, ids="-".join)
def test_the_kernels_answer_the_vectors(kernels: Native, place: tuple[str, str], threads: int) -> None:
    cases = CASES[place]
    assert cases
    wrong = {}
    for case in cases:
        found, wanted = answered(kernels, case, threads), known_here(case)
        if found != wanted:
            wrong[case.name] = found, wanted
    assert wrong == {}


def test_a_refused_update_changes_nothing(kernels: Native) -> None:
    refused = [case for case in CASES["check", "update-section"] if "refused" in case.expect]
    assert len(refused) > 20
    for case in refused:
        outer = np.arange(case.request["size"], dtype=np.float32)
        with pytest.raises(ProtocolError) as caught:
            kernels.outer_step(outer, bytes.fromhex(case.request["bytes"]))
        assert int(caught.value.code) == case.expect["refused"], case.name
        assert np.array_equal(outer, np.arange(outer.size, dtype=np.float32)), case.name
