from esper_telemetry.metrics import METRICS


def test_names_are_unique_and_say_their_type():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("esper_")
        assert metric.name.endswith("_total") == (metric.type == "counter")
        assert metric.name.removesuffix("_total").endswith("_seconds") == (metric.unit == "s")


def test_the_help_is_one_line_that_a_table_can_hold():
    for metric in METRICS:
        assert metric.help.endswith("."), metric.name
        assert "\n" not in metric.help, metric.name
        assert "|" not in metric.help, metric.name
