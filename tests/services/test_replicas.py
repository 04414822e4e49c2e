"""`lrt-deploy serve --replicas` with real replicas: what they answer, where requests go, kills, and the end.

Ray opens many ports, so these tests run again in a process whose network has nothing but the loopback interface; out
here is one test, which is whether all of those have passed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import failover
import own_network
import psutil
import pytest

from .conftest import BIN
from .test_states import QUESTIONS, Conversation, alone

INSIDE = own_network.INSIDE in os.environ
FORM = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

if not INSIDE:

    @pytest.mark.timeout(1800)
    def test_the_tests_of_replicas_pass_where_the_network_is_the_loopback_interface(tmp_path):
        report = tmp_path / "report.xml"
        command = ["-p", "no:cacheprovider", "-q", "-x", __file__, f"--junitxml={report}"]
        result = subprocess.run(
            own_network.command_inside(str(BIN / "pytest"), *command),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(r"^9 passed", result.stdout, flags=re.M) and "skipped" not in result.stdout, result.stdout

else:

    @pytest.fixture(scope="module")
    def states(tmp_path_factory):
        return tmp_path_factory.mktemp("states")

    @pytest.fixture(scope="module")
    def replicated(launch, states):
        return launch("--replicas", 2, "--state-dir", states, "--drain-seconds", 60)

    @pytest.fixture(scope="module")
    def replicas(replicated, states):
        found = failover.Replicas(replicated.process.pid, replicated.port, 2, states)
        found.wait()
        return found

    def by_replica(server, name):
        """A metric of each replica."""
        found = re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)$', server.get("/metrics").body.decode(), flags=re.M)
        return {replica: float(value) for replica, value in found}

    def read_by(server, ask):
        """Ask, and return the replicas that have read a prompt of more than one token for it."""
        before = by_replica(server, "lrt_prompt_tokens_total")
        ask()
        after = by_replica(server, "lrt_prompt_tokens_total")
        return {replica for replica in after if after[replica] - before[replica] > 10}

    def test_answers_are_those_of_one_server(replicated, replicas, decoder):
        assert replicated.about["replicas"] == 2
        expected = "".join(event.text for event in decoder.generate("Return the value", 24, stop_ids=[]))
        answer = replicated.complete("Return the value", **FORM)
        assert answer["choices"][0]["text"] == expected
        with_stream = replicated.open_stream("/v1/completions", {"prompt": "Return the value", **FORM})
        events = list(with_stream.events())
        assert events.pop() == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        assert len(events) > 1
        assert replicated.get("/v1/models").json["data"][0]["id"] == replicated.model
        assert replicated.get("/ready").json == {"status": "ready"}
        assert b"<!doctype html>" in replicated.get("/").body.lower()

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/v1/completions", b"{", 400),
            ("/v1/completions", {"prompt": "a", "tools": [1]}, 400),
            ("/v1/chat/completions", {"messages": []}, 400),
            ("/v1/nothing", {}, 404),
        ],
    )
    def test_errors_are_those_of_one_server(replicated, replicas, path, body, status):
        reply = replicated.post(path, body)
        assert reply.status == status and set(reply.error) == {"message", "type", "param", "code"}

    def test_a_conversation_stays_with_one_replica_and_all_can_answer_it(replicated, replicas, decoder):
        homes = []
        for at in range(8):
            chat = Conversation(decoder, tokens=12)
            texts = [f"{at}: {question}" for question in QUESTIONS]
            home = [read_by(replicated, lambda text=text, chat=chat: chat.ask(replicated, text)) for text in texts]
            assert all(where == home[0] and len(where) == 1 for where in home)
            homes.append(home[0].pop())
        assert len(set(homes)) == 2
        # The header decides where it is given; the answer is the same, and the folder saves reading it again.
        elsewhere = set()
        for session in range(8):
            messages = [*chat.messages[:-1]]

            def ask(messages=messages, session=session):
                body = {"messages": messages, "temperature": 0, "max_tokens": 12}
                reply = replicated.post("/v1/chat/completions", body, headers={"X-Session-Id": str(session)})
                text = reply.json["choices"][0]["message"]["content"]
                assert text == alone(decoder, messages, 12)
                assert reply.json["usage"]["lrt"]["reused_tokens"] > 16

            elsewhere |= read_by(replicated, ask)
        assert len(elsewhere) == 2

    def test_a_client_that_leaves_frees_its_slot(replicated, replicas):
        stream = replicated.open_stream("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 600, "ignore_eos": True})
        next(stream.events())
        assert sum(by_replica(replicated, "lrt_running").values()) == 1
        stream.close()
        until = time.monotonic() + 60
        while sum(by_replica(replicated, "lrt_running").values()):
            assert time.monotonic() < until

    def test_three_kills_change_no_answer(replicated, replicas, bundle):
        found = failover.run(replicated.port, replicas, failover.Reference(bundle), (8, 3, 3))
        assert found.wrong == [] and found.equal + found.near_ties == 24 and found.near_ties <= 1
        assert sum(found.kills.values()) == 3

    def test_nothing_listens_beyond_the_loopback_interface_and_the_end_is_clean(replicated, replicas):
        server = psutil.Process(replicated.process.pid)
        processes = [server, *server.children(recursive=True)]
        ports = [c.laddr for process in processes for c in process.net_connections("tcp") if c.status == "LISTEN"]
        assert len(ports) > 5
        assert {address.ip for address in ports} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        stream = replicated.open_stream("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 600, "ignore_eos": True})
        events = stream.events()
        next(events)
        replicated.signal(signal.SIGTERM)
        assert [*events][-1] == "[DONE]"
        assert replicated.wait() == 0, replicated.log.read_text()
        _, left = psutil.wait_procs(processes[1:], 30)
        assert left == []
