import assert from "node:assert/strict";
import test from "node:test";
import { InvariantViolation } from "../base/errors.ts";
import { milliseconds } from "../base/units.ts";
import { type Operation, Process } from "./process.ts";
import { step, Violation } from "./turn.ts";
import { type Schedule, Turns } from "./turns.ts";

/** Everyone in turn: each step is taken by another actor than the last, if there is one. */
const roundRobin: Schedule = {
  choose: (width, current) => (current + 1) % width,
  holdsBack: () => false,
};

function machine(schedule = roundRobin) {
  const turns = new Turns({ schedule, stepTime: 1000, beforeStep: () => {} });
  const outcomes: unknown[] = [];
  return {
    turns,
    outcomes,
    /** An actor that does `run` once. */
    add(name: string, run: (process: Process) => unknown, state: Float64Array[] = []): Process {
      let operations: Operation[] = [
        {
          run: () => run(process),
          settle: (outcome) => outcomes.push("value" in outcome ? outcome.value : outcome.error),
        },
      ];
      const next = () => {
        const [operation] = operations;
        operations = [];
        return operation;
      };
      const process: Process = new Process(name, turns, next, state);
      turns.actors.push(process);
      return process;
    },
    play() {
      for (let actor = turns.pick(); actor; actor = turns.pick()) actor.resume();
    },
  };
}

test("two processes take their steps in turn, and each goes on where it was", () => {
  const m = machine();
  const taken: string[] = [];
  for (const name of ["a", "b"])
    m.add(name, (process) => {
      let sum = 0;
      for (let i = 1; i <= 3; i++)
        sum += step(process, "add", () => {
          taken.push(name + i);
          return i;
        });
      return name + sum;
    });
  m.play();
  assert.deepEqual(taken, ["a1", "b1", "a2", "b2", "a3", "b3"]);
  assert.deepEqual([m.outcomes, m.turns.steps], [["a6", "b6"], 6]);
});

test("what a step throws, it throws again when the code runs again", () => {
  const m = machine();
  const error = new Error("refused");
  m.add("a", (process) => {
    try {
      step(process, "fails", () => {
        throw error;
      });
    } catch (caught) {
      step(process, "after", () => {});
      return caught;
    }
    return "unreachable";
  });
  m.add("b", (process) => step(process, "other", () => "other"));
  m.play();
  assert.deepEqual(m.outcomes.toSorted(), [error, "other"].toSorted());
});

test("what a process keeps beside shared memory is put back before its code runs again", () => {
  const m = machine();
  const counters = new Float64Array(1);
  const count = (process: Process) => {
    for (let i = 0; i < 3; i++) {
      counters[0]!++;
      step(process, "step", () => {});
    }
  };
  m.add("a", count, [counters]);
  m.add("b", (process) => {
    for (let i = 0; i < 5; i++) step(process, "step", () => {});
  });
  m.play();
  assert.equal(counters[0], 3);
});

test("broken twin: code that does not do the same again is noticed", () => {
  const m = machine();
  let run = 0;
  m.add("a", (process) => {
    step(process, run++ === 0 ? "first" : "other", () => {});
    step(process, "second", () => {});
  });
  m.add("b", (process) => step(process, "step", () => {}));
  assert.throws(() => m.play(), InvariantViolation);
});

test("who waits is woken by a change; who waits for nothing, by time", () => {
  const m = machine();
  let open = false;
  m.add("a", (process) =>
    process.waitFor(() => step(process, "look", () => open), milliseconds(1)) ? "opened" : "late",
  );
  m.add("b", (process) => {
    process.waitFor(() => false, milliseconds(0.5));
    step(process, "open", () => {
      open = true;
      process.changed();
    });
  });
  m.add("c", (process) => (process.waitFor(() => false, milliseconds(7)) ? "never" : "time is over"));
  m.play();
  assert.deepEqual(m.outcomes, [undefined, "opened", "time is over"]);
  assert.ok(m.turns.time >= 7e6 && m.turns.time < 8e6);
});

test("what a checker finds ends the run, whatever code it passes", () => {
  const m = machine();
  m.add("a", (process) => {
    try {
      step(process, "step", () => {
        throw new Violation("found");
      });
    } finally {
      step(process, "clean up", () => {});
    }
  });
  assert.throws(() => m.play(), /found/);
});

test("who is about to touch what others have touched can be held back until one of them has", () => {
  let hold = false;
  const m = machine({ choose: () => 0, holdsBack: () => hold });
  const taken: string[] = [];
  const touch = (process: Process, place: number) =>
    step(process, "touch", () => void taken.push(process.name + place), place);
  m.add("a", (process) => {
    touch(process, 1);
    touch(process, 2);
    hold = true;
    touch(process, 1);
  });
  m.add("b", (process) => {
    touch(process, 1);
    hold = false;
    touch(process, 3);
  });
  const visitor = m.add("c", (process) => touch(process, 1));
  m.turns.arrive(visitor, 1);
  m.play();
  assert.deepEqual(taken.slice(0, 4), ["a1", "a2", "b1", "a1"]);
});
