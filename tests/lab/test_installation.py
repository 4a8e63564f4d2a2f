"""What is looked for is found or has a remedy, and no network makes it wait."""

import threading
from email.message import Message
from importlib.metadata import PackageNotFoundError
from urllib.error import HTTPError, URLError

import pytest

from s3lab.lab import cli, installation


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """No test asks the network: each says what it would answer."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def answer(monkeypatch, error=None):
    class Reply:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def urlopen(request, timeout):
        assert request.get_method() == "HEAD" and timeout > 0
        if error is not None:
            raise error
        return Reply()

    monkeypatch.setattr(installation, "urlopen", urlopen)


def test_the_core_works_here(monkeypatch):
    findings = list(installation.check_core())
    assert installation.works(findings) and {finding.name for finding in findings} >= {"python", "s3lab"}


def test_a_core_that_computes_wrongly_is_seen(monkeypatch):
    monkeypatch.setattr(installation.s3lab, "prune", lambda weight, *_: type("S", (), {"weight": weight}))
    assert not installation.works(list(installation.check_core()))


def test_every_direct_dependency_is_compared_with_what_is_asked(monkeypatch):
    found = {finding.name: finding for finding in installation.check_packages()}
    assert {"torch", "numpy", "papermill", "transformers", "pytest"} <= found.keys()
    assert found["torch"].good and found["torch"].group == "core" and found["pytest"].group == "dev"


def test_a_missing_or_an_old_package_has_a_remedy(monkeypatch):
    def version(name):
        if name == "papermill":
            raise PackageNotFoundError(name)
        return "0.0.1"

    monkeypatch.setattr(installation, "version", version)
    found = {finding.name: finding for finding in installation.check_packages()}
    assert (found["papermill"].fact, found["papermill"].remedy) == ("missing", "pip install 's3lab[lab]'")
    assert not found["torch"].good and found["torch"].fact.startswith("0.0.1, needs >=")
    assert not installation.works(list(found.values()))
    assert all(finding.remedy for finding in found.values() if not finding.good)


@pytest.mark.parametrize(
    ("error", "good", "fact"),
    [
        (None, True, "reachable"),
        (HTTPError("", 403, "Forbidden", Message(), None), True, "reachable"),
        (HTTPError("", 503, "Unavailable", Message(), None), False, "503"),
        (URLError("name not known"), False, "name not known"),
        (TimeoutError("timed out"), False, "timed out"),
    ],
)
def test_the_hub_answers_or_the_reason_is_told(monkeypatch, error, good, fact):
    answer(monkeypatch, error)
    finding = installation.check_hub(1.0)
    assert finding.good is good and fact in finding.fact


def test_a_network_that_never_answers_does_not_hang_the_check(monkeypatch):
    hung = threading.Event()

    def never_answer(*_, **__):
        hung.wait()
        raise OSError("too late")

    monkeypatch.setattr(installation, "urlopen", never_answer)
    finding = installation.check_hub(0.01)
    hung.set()
    assert not finding.good and "no answer in 0.01 s" in finding.fact


def test_the_hub_is_not_asked_where_that_is_unwanted(monkeypatch):
    answer(monkeypatch, AssertionError("it was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in installation.check_hub().fact
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/hosts")
    assert "no http(s) address" in installation.check_hub().fact


def test_triton_without_a_device_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(installation.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {finding.name: finding for finding in installation.check_machine()}
    assert found["CPU"].good and not found["CUDA"].good and "TRITON_INTERPRET=1" in found["Triton"].remedy
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {finding.name: finding for finding in installation.check_machine()}["Triton"].good


def test_the_kernel_of_the_notebooks_is_found():
    assert {finding.name: finding.good for finding in installation.check_kernels()}["python3"]


@pytest.mark.parametrize(("works", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_the_core_works(monkeypatch, capsys, works, status):
    findings = [
        installation.Finding("core", "torch", works, "2.8", "remedy"),
        installation.Finding("lab", "rich", False, "-", "get it"),
    ]
    monkeypatch.setattr(installation, "check", lambda: findings)
    assert cli.main(["check"]) == status
    told = capsys.readouterr().out
    assert "→ get it" in told and ("→ remedy" in told) is not works
