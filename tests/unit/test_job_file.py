"""Job files, overrides and variables; every error says where it is and what to do."""

from pathlib import Path

import pytest

from batchinfer.errors import SpecError
from batchinfer.job_file import load_job, parse_job

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
MINIMAL = """\
model: {path: m}
input: {path: i}
prompt: {text: p}
output: {path: o}
"""
VALUES: dict[str, object] = {
    "model": {"path": "m"},
    "input": {"path": "i"},
    "prompt": {"text": "p"},
    "output": {"path": "o"},
}


def write(directory: Path, text: str) -> Path:
    path = directory / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(directory: Path, text: str, *overrides: str, environment: dict[str, str] | None = None) -> list[str]:
    """The error's lines, without the directory."""
    with pytest.raises(SpecError) as error:
        load_job(write(directory, text), overrides, environment or {})
    return str(error.value).replace(f"{directory}/", "").splitlines()


def override_problems(*overrides: str) -> list[str]:
    with pytest.raises(SpecError) as error:
        parse_job(VALUES, overrides, {})
    return str(error.value).splitlines()


def test_a_file_and_a_mapping_give_the_same_job(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, MINIMAL), environment={}) == parse_job(VALUES, environment={})


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_ready_job_file_loads(path: Path) -> None:
    spec = load_job(path, environment={})
    assert spec.name == path.stem


def test_there_are_ready_job_files() -> None:
    assert len(JOBS) >= 6


# Where a problem is, in plain words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("sampling: {temprature: 1}", "5:12: sampling.temprature: unknown key; did you mean 'temperature'?"),
        ("smapling: {}", "5:1: smapling: unknown key; did you mean 'sampling'?"),
        ("temperature: 1", "5:1: temperature: unknown key; did you mean 'sampling.temperature'?"),
        ("engine: {xyzzy: 1}", "5:10: engine.xyzzy: unknown key; known keys here: kind, max_batch_rows, "),
        ("engine: {fake: {seed: 1}}", "5:17: engine.fake.seed: unknown key; did you mean"),
        ("sampling: {n: abc}", "5:12: sampling.n: expected an integer, got 'abc'"),
        ("sampling: {n: 0}", "5:12: sampling.n: expected at least 1, got 0"),
        ("sampling: {n: }", "5:12: sampling.n: expected an integer, got nothing"),
        ("sampling: {n: [1]}", "5:12: sampling.n: expected an integer, got a list"),
        ("sampling: {top_p: 2}", "5:12: sampling.top_p: expected at most 1.0, got 2"),
        ("sampling: {top_p: .nan}", "5:12: sampling.top_p: expected at most 1.0, got nan"),
        ("sampling: {temperature: .inf}", "5:12: sampling.temperature: expected a finite number, got inf"),
        ("sampling: {ignore_eos: yes}", "5:12: sampling.ignore_eos: expected true or false, got 'yes'"),
        ("sampling: {stop: end}", "5:12: sampling.stop: expected a list, got 'end'"),
        ("sampling: {stop: [a, 3]}", "5:22: sampling.stop.1: expected text, got 3; put quotes around it"),
        ("sampling: {min_new_tokens: 600}", "5:1: sampling: min_new_tokens 600 is above max_new_tokens 512"),
        ("sampling: 3", "5:1: sampling: expected a block of keys, got 3"),
        ("name: 3", "5:1: name: expected text, got 3; put quotes around it"),
        ("name: ''", "5:1: name: expected text that is not empty, got ''"),
        ("engine: {kind: fast}", "5:10: engine.kind: expected 'auto', 'continuous', 'padded' or 'fake', got 'fast'"),
        ("cluster: {replicas: five}", "5:11: cluster.replicas: expected an integer or 'auto', got 'five'"),
        ("cluster: {replicas: 0}", "5:11: cluster.replicas: expected at least 1 or 'auto', got 0"),
        ("name: !!python/object:os.system x", "5:1: name: the YAML tag tag:yaml.org,2002:python/object:os.system is"),
        ("name: &a [*a]", "5:7: name.0: an alias may not refer to the block it stands in"),
        ("1: x", "5:1: ?: keys must be plain text; put quotes around this one"),
    ],
)
def test_a_problem_has_its_line_column_key_and_a_way_out(tmp_path: Path, line: str, problem: str) -> None:
    lines = problems(tmp_path, MINIMAL + line + "\n")
    assert any(found.startswith(f"job.yaml:{problem}") for found in lines), lines


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("[]", "expected text or a list of at least 1 item, got an empty list"),
        ("3", "expected text or a list, got 3; put quotes around it"),
        ("{a: b}", "expected text or a list, got a block of keys"),
    ],
)
def test_either_or_types_are_one_sentence(tmp_path: Path, path: str, problem: str) -> None:
    text = MINIMAL.replace("path: i", f"path: {path}")
    assert problems(tmp_path, text) == [f"job.yaml:2:9: input.path: {problem}"]


def test_a_bad_item_of_an_either_or_list_is_named_alone(tmp_path: Path) -> None:
    text = MINIMAL.replace("path: i", "path: [a, 3]")
    assert problems(tmp_path, text) == ["job.yaml:2:19: input.path.1: expected text, got 3; put quotes around it"]


def test_all_problems_are_reported_together_in_the_files_order(tmp_path: Path) -> None:
    text = "model: {path: m, dtype: bf16}\ninput: {}\nprompt: {}\noutput: {path: o, comprssion: zstd}\nfoo: 1\n"
    assert problems(tmp_path, text, "sampling.n=0") == [
        "job.yaml:1:18: model.dtype: expected 'bfloat16', 'float16' or 'float32', got 'bf16'",
        "job.yaml:2:1: input.path: missing; the job needs it and there is no default",
        "job.yaml:3:1: prompt: give exactly one of text, messages, template, token_ids, turns, request (given: none)",
        "job.yaml:4:19: output.comprssion: unknown key; did you mean 'compression'?",
        "job.yaml:5:1: foo: unknown key; known keys here: name, model, input, prompt, sampling, output, engine, "
        "cluster, execution, quality, telemetry",
        "--set sampling.n=0: expected at least 1, got 0",
    ]


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL.replace("model: {path: m}\n", "")) == [
        "job.yaml: model: missing; the job needs it and there is no default"
    ]


def test_a_key_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    lines = problems(tmp_path, MINIMAL + "sampling:\n  n: 1\n  n: 2\n")
    assert lines == ["job.yaml:7:3: sampling.n: the key is given twice (first at job.yaml:6:3); keep one"]


def test_a_long_wrong_value_is_not_quoted_whole(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, MINIMAL + f"sampling: {{n: {'x' * 500}}}\n")
    assert len(line) < 150


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "job.yaml: the file is empty"),
        ("# nothing\n", "job.yaml: the file is empty"),
        ("- a\n", "job.yaml: expected keys"),
        ("model: {path: m\n", "job.yaml:2:1: not valid YAML"),
        ("a: b: c\n", "job.yaml:1:5: not valid YAML"),
        ("a: {b: ${C}}\n", "job.yaml:1:9: not valid YAML: expected ',' or '}', but got '{'; put quotes around values"),
        ("a: \x01\n", "job.yaml: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2:1: not valid YAML"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text)[0].startswith(problem)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: the job file cannot be read: No such file"):
        load_job(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(SpecError, match="not UTF-8 text"):
        load_job(tmp_path / "latin.yaml")


def test_an_empty_block_is_a_block_of_defaults(tmp_path: Path) -> None:
    spec = load_job(write(tmp_path, MINIMAL + "sampling:\n  # temperature: 1\nengine: {fake: }\n"), environment={})
    assert spec.sampling.temperature == 0.0
    assert spec.engine.fake.error_rate == 0.0


def test_numbers_and_words_follow_yaml_1_2(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("path: o", "path: no")
        + "name: 2024-01-01\nsampling: {temperature: 1e-1, seed: 010, top_p: 1}\n"
    )
    spec = load_job(write(tmp_path, text), environment={})
    assert (spec.output.path, spec.name) == ("no", "2024-01-01")
    assert (spec.sampling.temperature, spec.sampling.seed, spec.sampling.top_p) == (0.1, 10, 1.0)


def test_relative_paths_stay_as_written(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, MINIMAL), environment={}).input.path == "i"


# Overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "block", "key", "value"),
    [
        ("sampling.temperature=0.7", "sampling", "temperature", 0.7),
        ("sampling.temperature=1e-2", "sampling", "temperature", 0.01),
        ("sampling.n = 3", "sampling", "n", 3),
        ("sampling.ignore_eos=true", "sampling", "ignore_eos", True),
        ("sampling.logprobs=null", "sampling", "logprobs", None),
        ("sampling.stop=[x, 'y z']", "sampling", "stop", ["x", "y z"]),
        ("sampling={n: 2}", "sampling", "n", 2),
        ("input.path=*.parquet", "input", "path", "*.parquet"),
        ("input.path=[a, b]", "input", "path", ["a", "b"]),
        ("input.path=s3://bucket/a=b/x", "input", "path", "s3://bucket/a=b/x"),
        ("output.path='7'", "output", "path", "7"),
        ("prompt={template: 'Say: {{ x }}'}", "prompt", "template", "Say: {{ x }}"),
        ("model.revision=", "model", "revision", None),
        ("input.storage_options.client_kwargs.endpoint_url=http://x", "input", "storage_options",
         {"client_kwargs": {"endpoint_url": "http://x"}}),
    ],
)  # fmt: skip
def test_overrides_set_any_key(override: str, block: str, key: str, value: object) -> None:
    assert getattr(getattr(parse_job(VALUES, [override], {}), block), key) == value


def test_template_overrides_need_no_quotes() -> None:
    spec = parse_job(VALUES, ["prompt.text=", "prompt.template={{ title }}: {{ text }} # now"], {})
    assert spec.prompt.template == "{{ title }}: {{ text }} # now"


def test_later_overrides_win_and_the_mapping_stays_as_it_was() -> None:
    spec = parse_job(VALUES, ["output.path=a", "output.path=b"], {})
    assert spec.output.path == "b"
    assert VALUES["output"] == {"path": "o"}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sampling.temprature=1", "--set sampling.temprature=1: unknown key; did you mean 'temperature'?"),
        ("sampling.temperature", "--set sampling.temperature: expected key=value, for example"),
        ("=1", "--set =1: expected key=value, for example"),
        ("sampling..n=1", "--set sampling..n=1: expected key=value, for example"),
        ("sampling.n=many", "--set sampling.n=many: expected an integer, got 'many'"),
        ("model.path.x=1", "--set model.path.x=1: model.path is a single value here and has no keys; set model.path"),
        ("nothing.at.all=1", "--set nothing.at.all=1: nothing: unknown key"),
        ("sampling.stop=[a", "--set sampling.stop=[a: the value is not valid YAML"),
        ("sampling.stop=[a, 3]", "--set sampling.stop=[a, 3]: sampling.stop.1: expected text, got 3"),
        ("sampling={n: 1, n: 2}", "--set sampling={n: 1, n: 2}: sampling.n: the key is given twice"),
    ],
)
def test_a_bad_override_is_its_own_place(override: str, problem: str) -> None:
    assert override_problems(override)[0].startswith(problem)


def test_an_override_replaces_what_was_wrong_in_the_file(tmp_path: Path) -> None:
    text = MINIMAL.replace("path: i", "path: '${NOT_SET}'") + "sampling: {n: abc}\n"
    spec = load_job(write(tmp_path, text), ["input.path=j", "sampling.n=2"], {})
    assert (spec.input.path, spec.sampling.n) == ("j", 2)


# Variables ---------------------------------------------------------------------------------------------------------


def test_variables_are_replaced_inside_text(tmp_path: Path) -> None:
    text = MINIMAL.replace("path: o", "path: 's3://${BUCKET}/${RUN}/out'").replace("{path: i}", "{path: ['${A}', b]}")
    spec = load_job(write(tmp_path, text), environment={"BUCKET": "b", "RUN": "7", "A": "a"})
    assert spec.output.path == "s3://b/7/out"
    assert spec.input.paths == ("a", "b")


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_TEST_OUT", "there")
    assert load_job(write(tmp_path, MINIMAL), ["output.path=${BATCHINFER_TEST_OUT}"]).output.path == "there"


def test_a_value_that_is_one_variable_is_text_where_text_will_do() -> None:
    values = VALUES | {"output": {"path": "${N}"}, "input": {"path": "i", "storage_options": {"secret": "${N}"}}}
    spec = parse_job(
        values, ["sampling.n=${N}", "cluster.replicas=${N}", "sampling.stop_token_ids=['${N}']"], {"N": "12"}
    )
    assert spec.output.path == "12"
    assert spec.input.storage_options == {"secret": "12"}
    assert (spec.sampling.n, spec.cluster.replicas, spec.sampling.stop_token_ids) == (12, 12, [12])
    assert parse_job(VALUES, ["cluster.replicas=${N}"], {"N": "auto"}).cluster.replicas == "auto"


def test_values_are_not_expanded_twice_and_escapes_and_jinja_stay() -> None:
    values = VALUES | {"prompt": {"template": "$${A} ${A} ${{ price }} $5 {{ x }}"}}
    assert parse_job(values, (), {"A": "${B}"}).prompt.template == "${A} ${B} ${{ price }} $5 {{ x }}"


def test_a_missing_variable_is_named_with_its_key_and_place(tmp_path: Path) -> None:
    lines = problems(tmp_path, MINIMAL.replace("path: o", "path: 'x/${NOT_SET}'"))
    assert lines == [
        "job.yaml:4:10: output.path: the environment variable NOT_SET is not set; set it, or write $${ for a plain ${"
    ]


@pytest.mark.parametrize("value", ["${a b}", "${}", "${A:-x}", "x ${A"])
def test_what_is_no_variable_is_refused(value: str) -> None:
    with pytest.raises(SpecError, match=r"is no variable; write \$\{NAME\}"):
        parse_job(VALUES, [f"output.path={value}"], {"A": "a"})


def test_values_from_the_environment_and_credentials_are_never_shown(tmp_path: Path) -> None:
    text = MINIMAL + "sampling: {n: '${SECRET}'}\ncluster: {replicas: '${SECRET}'}\n"
    text = text.replace("path: i", "path: i, storage_options: '${SECRET}'")
    overrides = ["output.storage_options=hush", "output.storage_options.key.x=hush", "execution.max_attempts=${SECRET}"]
    lines = problems(tmp_path, text, *overrides, environment={"SECRET": "hush"})
    assert len(lines) == 6
    assert not [line for line in lines if "hush" in line]
    assert "job.yaml:5:12: sampling.n: expected an integer, got the value of ${SECRET}" in lines
