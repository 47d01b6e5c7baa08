"""Averages over the data: the threshold is found on images, and a comparison reports the measured average."""

import json

import pytest
import torch

import tokensieve
from tokensieve import Refusal, parse
from tokensieve.budget import rule_of
from tokensieve.evaluate import compare, encode
from tokensieve.evaluate.average import calibrate_average, one_per_image


def tokens_of(model, processor, samples, method):
    kept = []
    with torch.no_grad(), tokensieve.attach(model, method, processor=processor) as sieve:
        for sample in samples:
            model(**encode(processor, [sample]), use_cache=False)
            kept.append(sieve.last[0][0].slots)
    return kept


@pytest.mark.parametrize("by", ["gain", "mass", "rank"])
def test_the_calibrated_images_have_the_average(model, processor, samples, tmp_path, by):
    images, seen = one_per_image(samples, 50), []
    stages = parse("vtc-cls", keep=f"average:16:{by}")
    options = {"text_processor": processor, "progress": lambda *done: seen.append(done)}
    result = calibrate_average(model, processor, images, stages, **options)
    kept = tokens_of(model, processor, images, result.method)
    assert (len(images), len(seen), result.images) == (4, 4, 4)
    assert abs(sum(kept) / 4 - 16) <= 2
    assert (result.mean, result.fewest, result.most) == (sum(kept) / 4, min(kept), max(kept))

    file = tmp_path / "average.json"
    result.save(file)
    assert json.loads(file.read_text())["method"] == result.method == f"vtc-cls(keep={result.keep!r})"
    assert tokens_of(model, processor, images, str(file)) == kept


def test_one_sample_per_image_spread_over_the_data(samples):
    assert [sample.id for sample in one_per_image(samples, 50)] == [sample.id for sample in samples[:4]]
    assert [sample.id for sample in one_per_image(samples, 2)] == [samples[0].id, samples[2].id]


def test_nothing_to_calibrate(model, processor, samples):
    for chosen, keep in ((samples, 16), ([], "average:16")):
        with pytest.raises(Refusal, match="at least one sample and a budget such as keep='average:64'"):
            calibrate_average(model, processor, chosen, parse("vtc-cls", keep=keep))


def test_a_comparison_calibrates_and_reports_the_measured_average(model, processor, samples, tmp_path):
    options = {"output": tmp_path, "max_new_tokens": 2, "measure": False, "referee": False}
    specs = ["vtc-cls", "divprune", "uniform + fastv"]
    results = compare(model, processor, samples[:4], specs[:2], [16, "average:16:rank"], **options)
    fixed, fitted, _, other = (row for row in results.rows if row.keep is not None)
    threshold = rule_of(fitted.keep).threshold
    assert (fixed.keep, fixed.tokens_after, fitted.method) == (16, 16, "vtc-cls")
    assert abs(fitted.tokens_after - 16) <= 2
    assert other.keep == fitted.keep == f"average:16:rank:{threshold!r}"  # the rank needs no method: one calibration
    assert fitted.label == "vtc-cls at average:16:rank"
    again = compare(model, processor, samples[:4], specs[:2], [16, "average:16:rank"], **options)
    assert [row.keep for row in again.rows] == [row.keep for row in results.rows]
