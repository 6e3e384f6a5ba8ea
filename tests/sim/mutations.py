"""Hand-made bugs, each put into a copy of the program to see whether the simulator finds it.

`python -m tests.sim.mutations` tries them all and prints a table. A bug is found when a simulation of the copy fails,
whichever checker fires; the table says which did, and under which seed.
"""

import contextlib
import io
import multiprocessing
import shutil
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = 80
ROUNDS = 25
KERNELS = "peer/core/kernels/_native*"

# Each copy runs in a process of its own, forked from one that has read all that is never changed: most of the time.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "numpy", "msgpack", "cryptography", "zstandard"])


@dataclass(frozen=True)
class Mutation:
    """One bug: in a file, this text becomes that one. It stands there exactly once."""

    bug: str
    file: str
    old: str
    new: str
    reference: bool = False  # without the kernels, so that the reference in numpy serves
    swarm: str = "--weather"  # a swarm in which it shows


MUTATIONS = (
    Mutation(
        "a packet counts after the round has closed",
        "protocol/round.py",
        "return Code.LATE if self.closed else None",
        "return None",
    ),
    Mutation(
        "a second packet of a peer gets a receipt too",
        "protocol/round.py",
        "return None if held.digest == digest else Code.DUPLICATE",
        "return None",
    ),
    Mutation(
        "a round is applied without its quorum",
        "protocol/round.py",
        "quorum = count >= self._rules.quorum",
        "quorum = count >= 1",
    ),
    Mutation(
        "a round waits beyond its deadline",
        "protocol/round.py",
        "wake_at_s = self.deadline_at_s if self._grace_at_s is None",
        "wake_at_s = self.deadline_at_s + 5 if self._grace_at_s is None",
    ),
    Mutation(
        "the packets of a null round count",
        "protocol/round.py",
        "(Verdict.ACCEPTED, 0) if kind == Kind.APPLIED else",
        "(Verdict.ACCEPTED, 0) if kind != Kind.GENESIS else",
    ),
    Mutation(
        "work is settled twice",
        "protocol/round.py",
        "work, self._work = self._work, None",
        "work = self._work",
    ),
    Mutation(
        "a packet counts for its sender as soon as its round is applied",
        "protocol/round.py",
        "accepted = record is not None and work.digest is not None and record.accepted(work.digest)",
        "accepted = record is not None and work.digest is not None and record.kind == Kind.APPLIED",
    ),
    Mutation(
        "records of a higher epoch are taken for those of a lower one",
        "protocol/round.py",
        "if record.epoch < tail.epoch or",
        "if record.epoch > tail.epoch or",
    ),
    Mutation(
        "a damaged state is trained on",
        "protocol/round.py",
        "if event.state_root != job.record.state_root:",
        "if not event.state_root:",
    ),
    Mutation(
        "a packet is settled by the newest record and not by that of its round",
        "protocol/round.py",
        "record = next((item for item in self._queue if item.round == work.round), None)",
        "record = self._queue[-1]",
    ),
    Mutation(
        "work that no packet took is forgotten",
        "protocol/round.py",
        "        effects.append(Settle(work.round, accepted))",
        "        effects += [Settle(work.round, accepted)] if work.digest is not None else []",
    ),
    Mutation(
        "steps done ahead are claimed in two rounds",
        "protocol/round.py",
        "self._work, self._ahead = _Work(event.round, steps, tokens), _Ahead()",
        "self._work = _Work(event.round, steps, tokens)",
    ),
    Mutation(
        "steps done ahead are thrown away when the update comes",
        "peer/core/replica.py",
        "            self.flat.values.sub_(self._start).add_(self.outer)",
        "            self.flat.values.copy_(self.outer)",
    ),
    Mutation(
        "steps done ahead count from where they began for ever",
        "peer/core/replica.py",
        "            self._start.copy_(self.outer)\n",
        "",
    ),
    Mutation(
        "the residual of a late packet is drained",
        "peer/core/replica.py",
        "        self._sent.put_back(self.residual)\n",
        "",
    ),
    Mutation(
        "undoing a packet forgets a position",
        "peer/core/sparseloco.py",
        "residual[self.positions] = self.originals",
        "residual[self.positions[1:]] = self.originals[1:]",
    ),
    Mutation(
        "an update is applied twice",
        "peer/core/codec.py",
        "            _NATIVE.outer_step(part.numpy(), section, threads=torch.get_num_threads())",
        "            for _ in range(2):\n"
        "                _NATIVE.outer_step(part.numpy(), section, threads=torch.get_num_threads())",
    ),
    Mutation(
        "the merge drops the weights",
        "peer/merge.py",
        "[entry.weight for entry in entries], [entry.clip for entry in entries]",
        "[1024 for entry in entries], [entry.clip for entry in entries]",
    ),
    Mutation(
        "the merge drops the last packet",
        "peer/merge.py",
        "sections = [packet.sections for packet in packets]",
        "sections = [packet.sections for packet in packets[: len(entries) - 1] or packets]\n"
        "    weights, clips = weights[: len(sections)], clips[: len(sections)]",
    ),
    Mutation(
        "a huge claim of tokens has a huge weight",
        "protocol/arithmetic.py",
        "min(tokens * WEIGHT_UNIT // nominal, WEIGHT_MAX)",
        "tokens * WEIGHT_UNIT // nominal % (4 * WEIGHT_MAX)",
    ),
    Mutation(
        "the divisor counts packets, not weights",
        "protocol/arithmetic.py",
        "total.den[sparse.indices] += weight",
        "total.den[sparse.indices] += WEIGHT_UNIT",
        reference=True,
    ),
    Mutation(
        "alpha is applied twice",
        "protocol/arithmetic.py",
        "np.sign(num) * ((np.abs(num) // divisor * alpha_q16) // ALPHA_ONE)",
        "np.sign(num) * (np.abs(num) // divisor * alpha_q16 // ALPHA_ONE * alpha_q16 // ALPHA_ONE)",
        reference=True,
    ),
    Mutation(
        "quantization error is lost",
        "peer/core/sparseloco.py",
        "acc[where] = originals[-1] - dequantized",
        "acc[where] = 0.0",
        reference=True,
    ),
    Mutation(
        "long gaps are one too long",
        "protocol/packing.py",
        "ends = np.cumsum(gaps // _CONTINUE + 1)",
        "gaps = gaps + (gaps >= _CONTINUE)\n    ends = np.cumsum(gaps // _CONTINUE + 1)",
        reference=True,
    ),
    Mutation(
        "another base than the round's passes",
        "protocol/packet.py",
        "if header.base_root != base_root:",
        "if not header.base_root:",
    ),
    Mutation(
        "forged signatures pass",
        "protocol/packet.py",
        '    verify(header.peer, "packet", header.signed_bytes, header.signature)\n',
        "",
    ),
    Mutation(
        "a receipt leaves before the packet is in the journal",
        "peer/sim/aggregator.py",
        "        self.disk.rows.setdefault(digest, Row(arrived, header.round, header.base_root))\n",
        "        row = Row(arrived, header.round, header.base_root)\n"
        "        self.later(0.5, lambda: self.disk.rows.setdefault(digest, row))\n",
    ),
    Mutation(
        "a restarted aggregator forgets the packets of the open round",
        "peer/sim/aggregator.py",
        "(row.round, row.base_root) == opened]",
        "(row.round, row.base_root) == ()]",
    ),
    Mutation(
        "a record names the one before the one before",
        "peer/sim/aggregator.py",
        "previous=head.digest,",
        "previous=self.disk.records[-2:][0].digest,",
    ),
    Mutation(
        "a restarted aggregator skips a round's update",
        "peer/sim/aggregator.py",
        "for record in records[start + 1 :]:",
        "for record in records[start + 2 :]:",
    ),
    Mutation(
        "a restarted aggregator takes up packets of another branch",
        "peer/sim/aggregator.py",
        "(row.round, row.base_root) == opened]",
        "row.round == head.round + 1]",
        swarm="--faults takeovers --peers 5 --quorum 2 --deadline 40 --up 0.01 --latency-ms 400",
    ),
    Mutation(
        "a takeover stays in the old epoch",
        "protocol/standby.py",
        "return first + (aggregators.index(key) - first) % len(aggregators)",
        "return epoch",
    ),
    Mutation(
        "a standby takes over from a copy that is far behind",
        "protocol/standby.py",
        "if head.digest not in (newest.digest, newest.previous):",
        "if head.round > newest.round:",
    ),
    Mutation(
        "a packet is stored, and not what undoes it",
        "peer/sim/volunteer.py",
        "self.disk = Disk(record, state, packet)",
        'self.disk = Disk(record, {k: v for k, v in state.items() if not k.startswith("sent.")}, packet)',
    ),
    Mutation(
        "a packet is stored, and not the residual",
        "peer/sim/volunteer.py",
        "self.disk = Disk(record, state, packet)",
        'self.disk = Disk(record, {**state, "residual": (self.disk.state or state)["residual"]}, packet)',
    ),
    Mutation(
        "a restarted peer does not know its packet any more",
        "peer/sim/volunteer.py",
        "open_packet = None if packet is None else (packet.round, packet.digest)",
        "open_packet = None",
    ),
)


def plant(mutation: Mutation, folder: Path) -> None:
    """Copy the program and put the bug in."""
    hidden = [KERNELS.rpartition("/")[2]] if mutation.reference else []
    ignored = shutil.ignore_patterns("__pycache__", *hidden)
    for room in ("protocol", "peer"):
        shutil.copytree(ROOT / room, folder / room, ignore=ignored)
    path = folder / mutation.file
    text = path.read_text("utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times"
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")


def hunt(mutation: Mutation) -> str:
    """What the simulator says of the program with this bug; empty when it found nothing."""
    words = f"simulate {mutation.swarm} --rounds {ROUNDS} --seed 1 --seeds {SEEDS}"
    with tempfile.TemporaryDirectory() as name:
        plant(mutation, Path(name))
        ours, theirs = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_simulate, args=(name, words.split(), theirs))
        process.start()
        theirs.close()
        status, out = ours.recv()
        process.join()
    lines = [line for line in out.splitlines() if line.startswith("seed ") and " failed at " in line]
    assert status == (1 if lines else 0), out[-2000:]
    return lines[-1] if lines else ""


def _simulate(folder: str, words: list[str], answer: Connection) -> None:
    """In a process of its own: what the program in this folder writes when it simulates."""
    sys.path.insert(0, folder)
    from peer import cli  # noqa: PLC0415  # the copy, which is on the path from now on

    assert Path(cli.__file__).is_relative_to(folder), "the copy runs and not the original"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = cli.main(words)
    answer.send((status, out.getvalue()))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    escaped = 0
    for item in MUTATIONS:
        if not wanted or any(word in item.bug for word in wanted):
            found = hunt(item)
            escaped += not found
            sys.stdout.write(f"| {item.bug} | {item.file} | {found or 'NOT FOUND'} |\n")
            sys.stdout.flush()
    sys.exit(escaped > 0)
