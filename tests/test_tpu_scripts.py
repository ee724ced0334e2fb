"""The TPU script runs exactly the expected commands, and none with --dry-run."""

import os
import pathlib
import shlex
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "tpu_scripts" / "tpu.sh"
ZONE = "--zone=us-west4-a"
FLAGS = ["--config=configs/finetune.py:xl", "--config.loss.mrl_dims=(256,768)"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]


@pytest.fixture
def call(tmp_path):
    """Runs the script with a `gcloud` and a `git` that only log their arguments."""
    log = tmp_path / "log"
    for name in ("gcloud", "git"):
        fake = tmp_path / name
        fake.write_text(
            "#!/usr/bin/env bash\n"
            f"{{ printf '%q ' {name} \"$@\"; echo; }} >>{shlex.quote(str(log))}\n"
            '[[ "$*" != *"describe"* ]] || echo "${STATE:-READY}"\n'
        )
        fake.chmod(0o755)

    def run(*arguments, state="READY"):
        log.write_text("")
        result = subprocess.run(
            [SCRIPT, *arguments],
            env=os.environ
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": state},
            capture_output=True,
            text=True,
        )
        done = [shlex.split(line) for line in log.read_text().splitlines()]
        return result, done

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--type=v5litepod-256"],
            ["tpu-vm", "create", "pod", "--version=v2-alpha-tpuv5-lite"],
        ),
        (
            ["--type=v5p-128", "--spot", "--queued"],
            [
                "queued-resources",
                "create",
                "pod",
                "--node-id=pod",
                "--runtime-version=v2-alpha-tpuv5",
            ],
        ),
    ],
)
def test_create_creates_the_slice(call, options, expected):
    result, done = call("create", "pod", ZONE, *options)
    assert result.returncode == 0, result.stderr
    kind = options[0].replace("--type", "--accelerator-type")
    spot = ["--spot"] if "--spot" in options else []
    assert done == [["gcloud", "compute", "tpus", *expected, kind, *spot, ZONE]]


def test_setup_copies_the_commit_and_mounts_the_bucket(call):
    result, done = call("setup", "pod", ZONE, "--bucket=my-bucket")
    assert result.returncode == 0, result.stderr
    assert done[0][:2] == ["git", "archive"]
    assert done[1][3:8] == [
        "tpu-vm",
        "scp",
        "/tmp/gecko_jax.tar.gz",
        "pod:",
        "--worker=all",
    ]
    assert '.venv/bin/pip install -q -e ".[tpu,tokenizers]"' in done[2][-2]
    assert "gcsfuse --implicit-dirs my-bucket /mnt/bucket" in done[3][-2]


def test_flags_reach_the_hosts_unchanged(call):
    result, done = call("train", "pod", ZONE, "--", *FLAGS)
    assert result.returncode == 0, result.stderr
    ((*head, command, zone),) = done
    assert (head, zone) == ([*SSH, "--worker=all"], ZONE)
    words = shlex.split(command.removeprefix("--command="))
    start = words.index("--distributed") + 1
    assert words[start : start + 2] == FLAGS


def test_resume_recreates_a_preempted_slice(call):
    options = ["resume", "pod", ZONE, "--type=v5litepod-16", "--spot", "--", *FLAGS]
    verbs = {}
    for state in ("READY", "PREEMPTED"):
        result, done = call(*options, state=state)
        assert result.returncode == 0, result.stderr
        verbs[state] = [words[4] for words in done if words[0] == "gcloud"]
    assert verbs["READY"] == ["describe", "ssh"]
    assert verbs["PREEMPTED"] == ["describe", "delete", "create", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["logs"], [*SSH, "--worker=0", "--command=tail -n 100 -F gecko.log", ZONE]),
        (
            ["sync", "--from=bucket/run", "--to=gs://b/run"],
            [
                *SSH,
                "--worker=0",
                "--command=gcloud storage rsync --recursive bucket/run gs://b/run",
                ZONE,
            ],
        ),
        (["delete"], [*SSH[:4], "delete", "pod", "--quiet", ZONE]),
        (
            ["delete", "--queued"],
            [
                *SSH[:3],
                "queued-resources",
                "delete",
                "pod",
                "--force",
                "--quiet",
                ZONE,
            ],
        ),
    ],
)
def test_the_other_verbs(call, arguments, words):
    verb, *options = arguments
    result, done = call(verb, "pod", ZONE, *options)
    assert result.returncode == 0, result.stderr
    assert done == [words]


def test_a_dry_run_prints_the_commands_without_running_them(call):
    for options in (
        ["create", "pod", ZONE, "--type=v5litepod-16"],
        ["setup", "pod", ZONE, "--bucket=b"],
        ["train", "pod", ZONE, "--", *FLAGS],
        ["delete", "pod", ZONE],
    ):
        _, done = call(*options)
        dry, none = call(*options[:3], "--dry-run", *options[3:])
        assert none == []
        assert [shlex.split(line) for line in dry.stdout.splitlines()] == done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tpu_scripts/tpu.sh VERB NAME"),
        (["create", "pod"], "--zone is missing"),
        (["create", "pod", ZONE, "--type=k80"], "such as v5litepod-16"),
        (["dance", "pod", ZONE], "unknown verb dance"),
        (["logs", "pod", ZONE, "--tail"], "unknown option --tail"),
        (["train", "pod", ZONE], "after --"),
        (["sync", "pod", ZONE, "--from=x", "--to=y"], "gs://BUCKET"),
    ],
)
def test_wrong_arguments_are_reported_before_anything_runs(call, arguments, message):
    result, done = call(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert done == []
