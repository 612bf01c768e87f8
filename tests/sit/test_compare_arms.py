"""What an arm of a comparison is trained with."""

from __future__ import annotations

import dataclasses

import pytest

from layersync_kernels.errors import ConfigError
from layersync_kernels.sit.studies.compare.arms import KNOWN_METHODS, arms
from layersync_kernels.sit.studies.compare.config import CompareConfig
from layersync_kernels.sit.studies.compare.plan import arm_lines

from .tiny import tiny_config


def terms(config):
    """What is on."""
    return config.layersync.layersync != ("off",), config.align.align, config.dispersive.dispersive != "off"


def test_each_method_has_its_terms_and_no_others():
    found = {arm.name: terms(arm.config) for arm in arms(tiny_config(), KNOWN_METHODS)}
    assert found == {
        "vanilla": (False, "off", False),
        "layersync": (True, "off", False),
        "repa": (False, "repa", False),
        "both": (True, "repa", False),
        "irepa": (False, "irepa", False),
        "sra": (False, "sra", False),
        "dispersive": (False, "off", True),
    }
    teachers = {arm.name: arm.config.align.teacher for arm in arms(tiny_config(), KNOWN_METHODS)}
    assert {name for name, teacher in teachers.items() if teacher == "efficientnet-lite0"} == {"repa", "both", "irepa"}
    assert {name for name, teacher in teachers.items() if teacher is None} == {
        "vanilla",
        "layersync",
        "sra",
        "dispersive",
    }


def test_several_of_one_method_differ_in_pair_weight_and_schedule():
    vanilla, near, far, mixed = arms(
        tiny_config(),
        (
            "vanilla",
            "near=layersync --layersync 1:2 --weight 0.5",
            "far=layersync --layersync 1:3 2:3 --weight 0.1 0.2 --schedule linear --start-step 2 --stop-step 8",
            "mixed=layersync --align repa --align-block 2 --dispersive 1 --every 2",
        ),
    )
    assert vanilla.config.layersync.layersync == ("off",)
    assert (near.config.layersync.layersync, near.config.layersync.weight) == (("1:2",), (0.5,))
    assert far.config.layersync.layersync == ("1:3", "2:3")
    when = far.config.layersync.when
    assert (when.schedule, when.start_step, when.stop_step) == ("linear", 2, 8)
    assert terms(mixed.config) == (True, "repa", True)
    assert (mixed.config.align.teacher, mixed.config.align.align_block) == ("efficientnet-lite0", 2)
    for arm in (near, far, mixed):
        rest = {name: getattr(vanilla.config, name) for name in ("layersync", "align", "dispersive")}
        assert dataclasses.replace(arm.config, **rest) == vanilla.config
    assert arm_lines([vanilla, far]) == [
        "- **vanilla**: nothing but the flow loss",
        "- **far**: LayerSync 1:3, 2:3, weight 0.1, 0.2, linear from step 2 until step 8",
    ]


def test_what_is_given_for_all_is_each_arms_own_too():
    config = tiny_config(align={"teacher": "resemblyzer", "align_weight": 0.3}, layersync={"weight": (0.7,)})
    repa, layersync = arms(config, ("repa", "strong=layersync --layersync 1:3"))
    assert (repa.config.align.teacher, repa.config.align.align_weight) == ("resemblyzer", 0.3)
    assert layersync.config.layersync.weight == (0.7,)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("vanilla", "magic"), "no method 'magic'; expected one of vanilla"),
        (("vanilla",), "expected two or more"),
        (("vanilla", "vanilla"), "vanilla is there twice"),
        (("vanilla", "a=layersync --weight 0.1", "a=layersync --weight 0.2"), "a is there twice"),
        (("vanilla", "layersync --weight 0.5"), "give it a name, as in NAME=layersync --weight 0.5"),
        (
            ("vanilla", "a=layersync --wait 0.5"),
            "--methods 'a=layersync --wait 0.5': .*--wait.*expected flags of the losses",
        ),
        (("vanilla", "a=layersync --lr 0.5"), "--lr.*expected flags of the losses"),
        (("vanilla", "a=layersync --weight much"), "much.*expected flags of the losses"),
        (("vanilla", "a=layersync --layersync '1:2"), "No closing quotation"),
        (("vanilla", "a="), "no method ''"),
        (("vanilla", "a=repa --teacher hub/evil:net"), "give --teacher for all methods, outside of --methods"),
        (("vanilla", "a=sra --align-gap 3"), "--align-gap 3.0: expected a time in"),
        (("vanilla", "../a=layersync --weight 1"), "no method '../a=layersync'"),
    ],
)
def test_arms_that_cannot_be_are_told(methods, message):
    with pytest.raises(ConfigError, match=message):
        arms(tiny_config(), methods)


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        (
            {"align": {"align": "irepa", "teacher": "x"}},
            ("vanilla", "repa"),
            "--align irepa is in none of the --methods",
        ),
        ({"dispersive": {"dispersive": 2}}, ("vanilla", "layersync"), "--dispersive is in none"),
        ({"layersync": {"layersync": ("off",)}}, ("vanilla", "layersync"), "--layersync off leaves nothing"),
    ],
)
def test_flags_that_no_arm_uses_are_told(changes, methods, message):
    with pytest.raises(ConfigError, match=message):
        CompareConfig(train=tiny_config(**changes), methods=methods, marks=1).validate()
