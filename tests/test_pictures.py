"""The pictures of the documents: what they are drawn from is what the studies say."""

from __future__ import annotations

import csv

import pictures
import pytest

from madkernels.synthetics.protocol import mad_score, results_of, scores


@pytest.mark.parametrize("study", ["demo", "strict-small"])
def test_runs_of_a_csv_file_give_the_scores_of_the_study(study: str) -> None:
    found = scores(results_of(pictures.read_runs(pictures.STUDIES / study / "runs.csv")))
    with (pictures.STUDIES / study / "results.csv").open() as file:
        told = {row["arch"]: float(row["mad_score"]) for row in csv.DictReader(file)}
    assert {arch: mad_score(by_task).value for arch, by_task in found.items()} == pytest.approx(told)


def test_every_benchmark_has_a_peer_that_is_not_ours() -> None:
    for op in pictures.BENCHMARKS:
        for direction in pictures.PASSES:
            peer, ratio = pictures.fastest_peer(op, direction)
            assert not peer.startswith("ours")
            assert ratio > 0
