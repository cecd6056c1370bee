"""Settings: config files, overrides, and errors that name the fix."""

import pytest

from safepatch_jax.outcome import settings_differences
from safepatch_jax.settings import Settings, declared_options, load_config


def test_config_file_and_override(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("CONFIG = {'patch': {'retention': 0.5, 'alpha': 2}}")
    settings = load_config(path)
    assert settings.patch.retention == 0.5 and settings.patch.alpha == 2.0
    assert settings.override({"patch.beta": 3.0}).patch.beta == 3.0
    assert Settings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"patch": {"retenton": 0.5}},
            "unknown setting 'patch.retenton' .did you mean 'patch.retention'",
        ),
        ({"patsh": {"retention": 0.5}}, "did you mean 'patch.retention'"),
        ({"patch": {"retention": 1.5}}, "'patch.retention' must be at most 1"),
        ({"patch": {"retention": 0.0}}, "'patch.retention' must be above 0"),
        ({"patch": {"top_rate_se": -0.1}}, "at least 0"),
        ({"patch": {"combine": "xor"}}, "one of difference, intersection, union"),
        ({"patch": {"retention": "0.5"}}, "must be of type float"),
        ({"patch": {"alpha": float("nan")}}, "'patch.alpha' must be finite"),
        ({"align": {"enabled": 1}}, "must be of type bool"),
        ({"patch": 3}, "must hold a dictionary"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(config)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match="retenton.*bogus"):
        Settings.from_dict({"patch": {"retenton": 1}, "bogus": {"x": 1}})


def test_config_file_errors(tmp_path):
    with pytest.raises(ValueError, match="No config file"):
        load_config(tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ValueError, match="defines no CONFIG"):
        load_config(tmp_path / "empty.py")


def test_every_option_is_documented():
    assert all(field.metadata["help"] for field in declared_options().values())


def test_differences_name_setting_and_values():
    new = Settings().override({"patch.alpha": 2.0})
    assert settings_differences(Settings().to_dict(), new.to_dict()) == ["patch.alpha: 1.0 -> 2.0"]
