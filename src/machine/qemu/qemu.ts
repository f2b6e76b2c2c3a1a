import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { closeSync } from "node:fs";
import type { Duplex } from "node:stream";
import { UserError } from "../../base/errors.ts";
import { socketPair } from "../../host/socket.ts";
import { type Accel, probeKvm } from "./accel.ts";
import { GuestAgent } from "./agent.ts";
import { which } from "./command.ts";
import { settles } from "./deadline.ts";
import { Tail } from "./lines.ts";
import { lastLines } from "./packages.ts";
import type { Qmp } from "./qmp.ts";
import { qmpOn } from "./qmp-socket.ts";

const CONSOLE_KEPT = 64 * 1024;
const STDERR_KEPT = 8 * 1024;
const QUIT_MS_MAX = 3_000;
const SIGNAL_MS_MAX = 2_000;

export interface QemuDevice {
  /** Inherited by QEMU; closed in this process once QEMU has started, or has failed to. */
  fds: readonly number[];
  /** Command line arguments, given the numbers that `fds` have in QEMU. */
  arguments: (childFds: readonly number[]) => readonly string[];
}

export interface QemuOptions {
  /** Left out: firmware boots from a device. */
  kernel?: string;
  initrd?: string;
  memoryMiB: number;
  cpus: number;
  accel: "auto" | Accel;
  /** More words for the kernel's command line. */
  append?: readonly string[];
  /** More properties of -machine: "kernel-irqchip=split". */
  machine?: readonly string[];
  devices?: readonly QemuDevice[];
  /** Hears the guest's console. Not with `shell`. */
  onConsole?: (text: string) => void;
  /** The guest's console is this process's terminal. */
  shell?: boolean;
}

export interface QemuExit {
  code: number | null;
  signal: NodeJS.Signals | null;
  /** What QEMU said last. */
  stderrTail: string;
}

/** For `agent.run`, with `shell`: a shell on the guest's console, until the person leaves it. See guest/agent/init. */
export const SHELL_SCRIPT =
  "mkfifo /tmp/shell.$$; echo /tmp/shell.$$ >/run/shell; read -r status </tmp/shell.$$; exit $status";

/**
 * An unmodified QEMU, its guest not yet running: `resume()` starts the guest. Nothing of it is in the file system:
 * control, agent and console are socket pairs, guest memory is a memfd.
 */
export interface Qemu {
  readonly pid: number;
  readonly version: string;
  readonly accel: Accel;
  readonly commandLine: readonly string[];
  readonly qmp: Qmp;
  readonly agent: GuestAgent;
  /** The last 64 KiB of the guest's console. */
  console(): string;
  resume(): Promise<void>;
  /** Never rejects. */
  readonly exited: Promise<QemuExit>;
  /** End QEMU: asked, then told, then killed. May be called at any time, any number of times. */
  close(): Promise<void>;
}

export async function startQemu(options: QemuOptions): Promise<Qemu> {
  const fds = (options.devices ?? []).flatMap((device) => device.fds);
  try {
    const qemu = which("qemu-system-x86_64");
    if (!qemu) throw new UserError("qemu-system-x86_64 is not installed: see `coiommu doctor`", 1);
    const accel = options.accel === "auto" ? (await probeKvm(qemu)).accel : options.accel;
    const commandLine = [qemu, ...qemuArguments(options, accel)];
    return await greeted(new Running(commandLine, accel, options, fds));
  } finally {
    for (const fd of fds) closeSync(fd);
  }
}

async function greeted(running: Running): Promise<Qemu> {
  try {
    await running.greet();
    return running;
  } catch (error) {
    await running.close();
    const { stderrTail, signal } = await running.exited;
    const said = lastLines(stderrTail, 3).replaceAll(/(^|; )\S*qemu-system-x86_64: /g, "$1");
    throw new UserError(`QEMU did not start: ${said || signal || (error as Error).message}`, 1);
  }
}

/**
 * Without hardware behind it the kernel would distrust the TSC, and every look at the clock would leave the guest;
 * mitigations and 5-level page tables, which cost real hardware little, cost a sixth of all I/O.
 */
const TCG_WORDS = ["tsc=reliable", "mitigations=off", "no5lvl"];

/** Numbers of the inherited descriptors in QEMU, after stdin, stdout and stderr. */
const FD = { qmp: 3, agent: 4, console: 5, firstDevice: 6 } as const;

export function qemuArguments(options: QemuOptions, accel: Accel): string[] {
  const machine = ["q35", "memory-backend=m0", ...(options.machine ?? [])].join(",");
  const words = ["console=ttyS0", "quiet", "panic=-1", ...(accel === "tcg" ? TCG_WORDS : [])];
  const append = [...words, ...(options.append ?? [])].join(" ");
  const console = options.shell ? "stdio,id=console,signal=off" : `socket,id=console,fd=${FD.console}`;
  let fd: number = FD.firstDevice;
  const devices = (options.devices ?? []).flatMap((device) => device.arguments(device.fds.map(() => fd++)));
  return [
    ...["-accel", accel, "-cpu", accel === "kvm" ? "host" : "max", "-smp", String(options.cpus)],
    ...["-m", `${options.memoryMiB}M`, "-machine", machine],
    ...["-object", `memory-backend-memfd,id=m0,size=${options.memoryMiB}M,share=on`],
    ...["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"],
    ...["-chardev", `socket,id=qmp,fd=${FD.qmp}`, "-mon", "chardev=qmp,mode=control"],
    ...["-chardev", console, "-serial", "chardev:console"],
    ...["-chardev", `socket,id=agent,fd=${FD.agent}`, "-serial", "chardev:agent"],
    ...(options.kernel === undefined ? [] : ["-kernel", options.kernel, "-append", append]),
    ...(options.initrd === undefined ? [] : ["-initrd", options.initrd]),
    ...devices,
  ];
}

class Running implements Qemu {
  readonly pid: number;
  readonly accel: Accel;
  readonly commandLine: readonly string[];
  readonly qmp: Qmp;
  readonly agent: GuestAgent;
  readonly exited: Promise<QemuExit>;
  version = "";
  readonly #child: ChildProcess;
  readonly #console = new Tail(CONSOLE_KEPT);
  readonly #terminal: string | undefined;
  #closing: Promise<void> | undefined;

  constructor(commandLine: readonly string[], accel: Accel, options: QemuOptions, fds: readonly number[]) {
    this.commandLine = commandLine;
    this.accel = accel;
    this.#terminal = options.shell ? terminalSettings() : undefined;
    const [qmpFd, qemuQmpFd] = socketPair();
    this.qmp = qmpOn(qmpFd);
    const child = spawnBound(commandLine, options.shell === true, [qemuQmpFd, ...fds]);
    closeSync(qemuQmpFd);
    this.#child = child;
    this.pid = child.pid ?? 0;
    this.agent = new GuestAgent(streamAt(child, FD.agent)!, () => this.#console.lastLine());
    streamAt(child, FD.console)?.on("data", (chunk: Buffer) => {
      const text = chunk.toString("latin1").replaceAll("\r", "");
      this.#console.append(text);
      options.onConsole?.(text);
    });
    this.exited = watch(child);
    void this.exited.then((exit) => {
      this.agent.fail(`QEMU ${describe(exit, this.#closing !== undefined)}`);
      for (const stream of child.stdio) stream?.destroy();
      this.qmp.close();
    });
  }

  async greet(): Promise<void> {
    this.version = await this.qmp.ready;
  }

  console(): string {
    return this.#console.text;
  }

  async resume(): Promise<void> {
    await this.qmp.execute("cont");
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  async #end(): Promise<void> {
    this.qmp.execute("quit").catch(() => {});
    let ended = await settles(this.exited, QUIT_MS_MAX);
    for (const signal of ["SIGTERM", "SIGKILL"] as const) {
      if (ended) break;
      this.#child.kill(signal);
      ended = await settles(this.exited, SIGNAL_MS_MAX);
    }
    if (this.#terminal !== undefined) restoreTerminal(this.#terminal);
    if (!ended) throw new UserError(`QEMU (process ${this.pid}) cannot be killed: it hangs in the kernel`, 1);
  }
}

/**
 * QEMU dies with the *thread* that calls this, however that ends (setpriv's parent death signal; without setpriv,
 * when Node ends in order). Unless it owns the terminal it gets a session of its own, so that a Ctrl-C is ours to
 * handle, and the guest ends in order.
 */
function spawnBound(
  commandLine: readonly string[],
  ownsTerminal: boolean,
  [qmpFd, ...fds]: readonly number[],
): ChildProcess {
  const setpriv = which("setpriv");
  const [file, ...args] = [...(setpriv ? [setpriv, "--pdeathsig", "KILL", "--"] : []), ...commandLine];
  const terminal = ownsTerminal ? "inherit" : "ignore";
  const child = spawn(file!, args, {
    // "pipe" is a socket pair beyond stderr, as QEMU's chardevs want it.
    stdio: [terminal, terminal, "pipe", qmpFd!, "pipe", ownsTerminal ? "ignore" : "pipe", ...fds],
    detached: !ownsTerminal,
  });
  const kill = () => child.kill("SIGKILL");
  process.once("exit", kill);
  child.once("close", () => process.off("exit", kill));
  return child;
}

/** Our end of a socket pair; its errors say no more than QEMU's end does. */
function streamAt(child: ChildProcess, fd: number): Duplex | undefined {
  const stream = child.stdio[fd as 3] as Duplex | null;
  return stream?.on("error", () => {});
}

function watch(child: ChildProcess): Promise<QemuExit> {
  const stderr = new Tail(STDERR_KEPT);
  child.stderr!.on("data", (chunk: Buffer) => stderr.append(chunk.toString()));
  return new Promise((resolve) => {
    child.once("error", (error) => resolve({ code: null, signal: null, stderrTail: error.message }));
    // "close": when what QEMU said last has been read too.
    child.once("close", (code, signal) => resolve({ code, signal, stderrTail: stderr.text }));
  });
}

function describe({ code, signal, stderrTail }: QemuExit, asked: boolean): string {
  if (asked) return "was ended";
  const said = lastLines(stderrTail, 2);
  const how = signal ? `was killed by ${signal}` : `ended with code ${code}`;
  return said === "" ? how : `${how} (${said})`;
}

function terminalSettings(): string | undefined {
  if (!process.stdin.isTTY) return undefined;
  return execFileSync("stty", ["-g"], { stdio: ["inherit", "pipe", "ignore"], encoding: "utf8" }).trim();
}

const restoreTerminal = (settings: string): void => {
  execFileSync("stty", [settings], { stdio: ["inherit", "ignore", "ignore"] });
};
