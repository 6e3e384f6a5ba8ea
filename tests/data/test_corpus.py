import pytest

from peer.data.corpus import SEPARATOR, embedded_documents, held_out


def test_embedded_corpus_has_every_speech_in_order() -> None:
    documents = embedded_documents("state-of-the-union")
    assert len(documents) == 233
    assert documents[0].startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert "Thank you for your patience. (Applause.)" in documents[-1]
    assert all(document == document.strip() and SEPARATOR not in document for document in documents)


def test_unknown_corpus_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="data_paths"):
        embedded_documents("../secrets")


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(233, 0.05, 12), (100, 0.05, 5), (2, 0.0001, 1), (2, 0.5, 1), (3, 0.99, 2)]
)
def test_a_share_of_the_documents_is_held_out(count: int, fraction: float, expected: int) -> None:
    assert held_out(count, fraction) == expected


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.05), (0, 0.05), (10, 0.0), (10, 1.0)])
def test_impossible_splits_are_refused(count: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"documents|validation_fraction"):
        held_out(count, fraction)
