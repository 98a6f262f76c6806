"""Results on disk: going on, refusing what does not fit, surviving half a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigain_kernels.evaluation.classify import ImageResult
from bigain_kernels.evaluation.records import ResultsFile

SETTINGS = {"seed": 0, "stages": ((2, 4), (6, 1))}


def _image(index: int) -> ImageResult:
    return ImageResult(index, 1, 1, (0.5, 0.1 + index / 3), 36, 0.25)


def test_results_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with ResultsFile(path, SETTINGS) as results:
        results.add(_image(1))
    with ResultsFile(path, SETTINGS, resume=True) as results:
        assert results.images == [_image(1)]
        results.add(_image(0))
        assert results.result.images == [_image(0), _image(1)]
    with ResultsFile(path, SETTINGS, resume=True) as results:
        assert results.images == [_image(1), _image(0)]


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, SETTINGS) as results:
        results.add(_image(0))
        results.add(_image(1))
    path.write_bytes(path.read_bytes()[:-9])
    with ResultsFile(path, SETTINGS, resume=True) as results:
        assert results.images == [_image(0)]
        results.add(_image(1))
    with ResultsFile(path, SETTINGS, resume=True) as results:
        assert results.images == [_image(0), _image(1)]


def test_resume_without_a_file_begins(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "results.jsonl", SETTINGS, resume=True) as results:
        assert results.images == []


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        with ResultsFile(path, SETTINGS) as results:
            assert results.images == []
            results.add(_image(0))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, SETTINGS) as results:
        results.add(_image(0))
    with pytest.raises(ValueError, match=r"^resume: got .* with other settings \(seed 0 there and 1 now\)"):
        ResultsFile(path, {**SETTINGS, "seed": 1}, resume=True)


def test_nothing_is_written_before_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, SETTINGS):
        pass
    assert not path.exists()
    with ResultsFile(path, SETTINGS) as results:
        results.add(_image(0))
    before = path.read_bytes()
    with ResultsFile(path, {**SETTINGS, "seed": 1}):
        pass
    assert path.read_bytes() == before


def test_a_file_without_results_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"settings": {"seed": 5}}\n')
    with ResultsFile(path, SETTINGS, resume=True) as results:
        results.add(_image(0))
    with ResultsFile(path, SETTINGS, resume=True) as results:
        assert results.images == [_image(0)]


@pytest.mark.parametrize("content", ["no json\n", '{"settings": {}}\n{"index": 0}\n', '{"else": 1}\n'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^resume: got"):
        ResultsFile(path, SETTINGS, resume=True)
    assert path.read_text() == content
