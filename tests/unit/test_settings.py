"""Settings: flag > environment > file > default, and errors that say where, what and how."""

from pathlib import Path
from typing import Any

import pytest

from carserver.cli.settings import ConfigError, load_settings
from carserver.config import Settings


def load(tmp_path: Path, flags: dict[str, Any] | None = None, file: str | None = None, **environ: str) -> Settings:
    if file is not None:
        (tmp_path / "carserver.toml").write_text(file)
    return load_settings({"state_dir": str(tmp_path), **(flags or {})}, environ)


def test_without_anything_every_setting_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path) == Settings(state_dir=str(tmp_path))


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    file = 'port = 1\nhost = "127.0.0.2"\nlog_level = "error"\n'
    settings = load(tmp_path, {"port": 3}, file, CARSERVER_PORT="2", CARSERVER_HOST="127.0.0.3")
    assert (settings.port, settings.host, settings.log_level) == (3, "127.0.0.3", "error")


def test_flags_that_were_not_given_hide_nothing(tmp_path: Path) -> None:
    settings = load(tmp_path, {"port": None, "allow_host": ()}, CARSERVER_PORT="2", CARSERVER_ALLOW_HOST="a")
    assert (settings.port, settings.allow_host) == (2, ("a",))


def test_variables_are_converted_and_lists_are_split_at_commas(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        CARSERVER_AUTH="false",
        CARSERVER_GRACE_S="0.5",
        CARSERVER_ALLOW_HOST=" one, two,,",
        CARSERVER_AUTH_TOKEN="null",
    )
    assert (settings.auth, settings.grace_s, settings.allow_host) == (False, 0.5, ("one", "two"))
    assert settings.auth_token == "null", "a text is a text"


@pytest.mark.parametrize(
    ("flags", "file", "environ", "message"),
    [
        ({"port": 70_000}, None, {}, "flag `--port` is 70000: it must be an integer, at least 0 and at most 65535"),
        ({}, None, {"CARSERVER_PORT": "abc"}, "environment variable `CARSERVER_PORT` is 'abc': it must be an integer"),
        ({}, None, {"CARSERVER_GRACE_S": "nan"}, "must be a number, more than 0 and at most 86400"),
        ({}, None, {"CARSERVER_DURABILITY": "much"}, "must be one of full, normal, memory"),
        ({}, None, {"CARSERVER_AUTH": "perhaps"}, "must be true or false"),
        ({}, "port = 'x'", {}, "carserver.toml: key `port` is 'x': it must be an integer"),
        ({}, "allow_host = 'x'", {}, "key `allow_host` is 'x': it must be a list of texts"),
        ({}, "port = ", {}, "is not TOML"),
        ({}, "prot = 1", {}, "unknown key 'prot'; did you mean port"),
        ({}, "zzzzzz = 1", {}, "unknown key 'zzzzzz'"),
        ({}, "state_dir = '/x'", {}, "`state_dir` cannot be set here"),
        (
            {},
            None,
            {"CARSERVER_PROT": "1"},
            "unknown environment variable 'CARSERVER_PROT'; did you mean CARSERVER_PORT",
        ),
        ({"host": " "}, None, {}, "host is blank"),
    ],
)
def test_an_error_says_where_the_value_stands_what_it_is_and_what_would_be_right(
    tmp_path: Path, flags: dict[str, Any], file: str | None, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, flags, file, **environ)
    assert message in str(caught.value)


def test_variables_of_the_clients_are_not_unknown(tmp_path: Path) -> None:
    load(tmp_path, CARSERVER_URL="ws://x", CARSERVER_AGENT_TOKEN="a.b", OTHER="1", _CARSERVER_COMPLETE="bash_source")


def test_a_token_is_never_in_an_error(tmp_path: Path) -> None:
    for file, environ in [
        ("auth_token = 8675309", {}),
        ('host_token = ["8675309"]', {}),
        ('auth_tokn = "8675309"', {}),
        (None, {"CARSERVER_AUTH_TOKN": "8675309"}),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, None, file, **environ)
        assert "8675309" not in str(caught.value)


def test_a_token_from_outside_stands_for_the_files_in_either_form(tmp_path: Path) -> None:
    settings = load(tmp_path, None, 'auth_token_file = "/x"\nhost_token = "h"\n', CARSERVER_AUTH_TOKEN="a")
    assert (settings.auth_token, settings.auth_token_file, settings.host_token) == ("a", None, "h")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_file_that_is_named_is_read_instead_and_must_exist(tmp_path: Path, by_variable: bool) -> None:
    def load_named(name: str) -> Settings:
        path = str(tmp_path / name)
        environ = {"CARSERVER_CONFIG": path} if by_variable else {}
        return load_settings({"state_dir": str(tmp_path)}, environ, None if by_variable else path)

    (tmp_path / "carserver.toml").write_text("port = 1")
    (tmp_path / "other.toml").write_text("port = 2")
    assert load_named("other.toml").port == 2
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_named("missing.toml")


def test_no_authentication_is_for_loopback_only(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert load(tmp_path, {"auth": False, "host": host}).host == host
    for host in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        assert load(tmp_path, {"host": host}).auth
        with pytest.raises(ConfigError, match="authentication off"):
            load(tmp_path, {"auth": False, "host": host})


def test_the_state_folder_is_absolute_and_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {"CARSERVER_STATE_DIR": "~/s"}).state_dir == str(tmp_path / "s")
    assert load_settings({"state_dir": "s"}, {}).state_dir == str(tmp_path / "s")
    assert load_settings({}, {}).state_dir == str(tmp_path / ".local/state/carserver")
