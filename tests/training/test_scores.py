"""What a record says of a network's answers, by hand and by scikit-learn."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, roc_auc_score

from rmprune.training.evaluation import scores


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_scikit_learns(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (60,), generator=generator) * torch.randint(0, 2, (60,), generator=generator)
    logits = torch.randn(60, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    found, told = scores(logits, labels, [f"kind {c}" for c in range(classes)]), logits.argmax(1)
    chances = logits.double().softmax(1)
    assert found["accuracy"] == pytest.approx(float((told == labels).double().mean()))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, told))
    expected = roc_auc_score(labels, chances[:, 1] if classes == 2 else chances, multi_class="ovr")
    assert found["auc"] == pytest.approx(expected)
    precision, recall, _, images = precision_recall_fscore_support(labels, told)
    for c, entry in enumerate(found["classes"]):
        assert entry == {
            "name": f"kind {c}",
            "images": images[c],
            "recall": pytest.approx(recall[c]),
            "precision": pytest.approx(precision[c]),
        }


def test_a_class_that_is_not_there_and_one_that_is_never_said() -> None:
    found = scores(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    assert found["auc"] is None and found["balanced_accuracy"] == 0.5
    assert [(entry["name"], entry["recall"], entry["precision"]) for entry in found["classes"]] == [
        ("0", 1.0, 0.5), ("1", 0.0, None), ("2", None, None),
    ]  # fmt: skip
