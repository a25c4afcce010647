"""Chapter 05 on the film reviews of the document: the fine-tuned model beats counting words, on every layout."""

import json

import nbformat
import pytest
from excerpts import DATA, with_data

from minipar.course import build

REVIEWS = DATA / "reviews"

REPORT = """\
import json

scores = {name: float((found == truth).mean()) for name, found in answers.items()}
low = {name: float(some[1]) for name, some in gains.items()}
print(json.dumps({"on": ON, "baseline": float((baseline == truth).mean()), "scores": scores, "low": low}))
"""


@pytest.mark.skipif(not REVIEWS.is_dir(), reason="the film reviews are not on this machine")
def test_on_film_reviews_every_layout_beats_the_baseline(tmp_path):
    notebook = with_data("05_practice", "REVIEWS", REVIEWS)
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT, id="report"))
    build.run(notebook, tmp_path)
    found = json.loads(notebook.cells[-1].outputs[0].text)
    assert found["on"] == "film reviews" and len(found["scores"]) == 6
    assert all(score > found["baseline"] for score in found["scores"].values()), found
    one_process = found["scores"]["one process"]
    assert one_process > found["baseline"] + 0.03 and found["low"]["one process"] > 0, found
    for name in ("dp=2", "tp=2", "pp=2", "2x2x2"):
        assert abs(found["scores"][name] - one_process) < 0.02, found
