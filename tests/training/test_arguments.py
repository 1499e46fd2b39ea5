"""Invalid options of the objective are refused."""

import pytest

from cllm.errors import UsageError
from cllm.training.arguments import CllmTrainingArguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, hard, got 'kl'"),
        ({"state_choice": "last"}, "state_choice must be one of uniform, noise, got 'last'"),
        ({"use_gt_labels": True, "ar_loss": "fixed_point"}, "means ar_loss labels, got ar_loss fixed_point"),
        ({"label_smoothing_factor": 0.1}, "ar_loss must be fixed_point or labels, got target"),
        ({"label_smoothing_factor": 1.0, "ar_loss": "labels"}, "at least 0 and below 1, got 1.0"),
    ],
    ids=str,
)
def test_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        CllmTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
