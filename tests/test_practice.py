"""Chapter 05: its scores against scikit-learn's; and on the film reviews of the document the fine-tuned model beats
counting words, on every layout."""

import json

import nbformat
import numpy as np
import pytest
from excerpts import DATA, defined, with_data
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from minipar.course import build

REVIEWS = DATA / "reviews"

REPORT = """\
import json

scores = {name: float((found == truth).mean()) for name, found in answers.items()}
low = {name: float(some[1]) for name, some in gains.items()}
print(json.dumps({"on": ON, "baseline": float((baseline == truth).mean()), "scores": scores, "low": low}))
"""


def test_scores_of_a_confusion_matrix_are_those_of_scikit_learn_also_at_0_by_0():
    from_confusion = defined("05_practice", "from_confusion")["from_confusion"]
    draw = np.random.default_rng(0)
    truth, answer = draw.integers(5, size=(2, 200))
    answer[answer == 3] = 0  # never answered
    truth[truth == 4] = 1  # never there
    wrong = np.where(truth == 2, 1, answer)  # there, and never found
    for given in (answer, wrong):
        C = confusion_matrix(truth, given, labels=range(6))  # of the sixth there is nothing at all
        *wanted, _ = precision_recall_fscore_support(truth, given, labels=range(6), zero_division=0)
        np.testing.assert_allclose(from_confusion(C), wanted)


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
