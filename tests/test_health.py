from dataclasses import MISSING, fields

import pytest

from esper_telemetry.health import (
    GradientHealth,
    HealthTier,
    LayerGradientStats,
    aggregate_layer_gradient_health,
)


def layer(name="layer", inf_count=0, nan_count=0, zero_fraction=0.0, large_fraction=0.0):
    return LayerGradientStats(
        layer_name=name,
        param_count=10,
        norm=1.0,
        mean=0.0,
        std=1.0,
        min=-1.0,
        max=1.0,
        zero_fraction=zero_fraction,
        small_fraction=0.0,
        large_fraction=large_fraction,
        nan_count=nan_count,
        inf_count=inf_count,
    )


@pytest.mark.parametrize(("count", "tier"), [(0, "healthy"), (1, "warning"), (5, "warning"), (6, "critical")])
def test_tiers_are_0_then_1_to_5_then_more(count, tier):
    assert HealthTier.of(count) is HealthTier(tier)


def test_counts_are_summed_over_layers_each_kind_apart():
    health = aggregate_layer_gradient_health([layer("a", inf_count=2), layer("b", inf_count=3, nan_count=1)])
    assert (health.inf_grad_count, health.nan_grad_count) == (5, 1)


def test_dead_and_exploding_layers_are_counted_above_their_fractions_not_at_them():
    health = aggregate_layer_gradient_health(
        [layer(zero_fraction=0.9), layer(zero_fraction=0.91), layer(large_fraction=0.1), layer(large_fraction=0.11)]
    )
    assert (health.dead_layers, health.exploding_layers) == (1, 1)


def test_each_layer_keeps_its_own_tier():
    health = aggregate_layer_gradient_health([layer("a"), layer("b", nan_count=1), layer("c", inf_count=6)])
    assert health.layer_gradient_health == {
        "a": HealthTier.HEALTHY,
        "b": HealthTier.WARNING,
        "c": HealthTier.CRITICAL,
    }


def test_no_layers_give_a_complete_result():
    assert aggregate_layer_gradient_health([]) == GradientHealth(0, 0, 0, 0, {})


def test_no_field_of_the_sum_has_a_default_to_hide_behind():
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(GradientHealth))
