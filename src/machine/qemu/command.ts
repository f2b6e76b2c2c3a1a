import { spawn } from "node:child_process";
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";

export interface Outcome {
  code: number;
  stdout: string;
  stderr: string;
}

export interface CommandOptions {
  cwd?: string;
  env?: Record<string, string>;
  /** Killed after this long; then the code is 128. */
  timeoutMs?: number;
}

/** Run a program to its end. Never rejects: a program that cannot be started ends with code 127 and the reason in stderr. */
export function command(argv: readonly string[], options: CommandOptions = {}): Promise<Outcome> {
  const [file, ...args] = argv;
  return new Promise((resolve) => {
    const child = spawn(file!, args, {
      cwd: options.cwd,
      env: { ...process.env, LC_ALL: "C", ...options.env },
      stdio: ["ignore", "pipe", "pipe"],
      killSignal: "SIGKILL",
      ...(options.timeoutMs === undefined ? {} : { timeout: options.timeoutMs }),
    });
    let stdout = "";
    let stderr = "";
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      stdout += text;
    });
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      stderr += text;
    });
    child.once("error", (error) => resolve({ code: 127, stdout, stderr: error.message }));
    child.once("close", (code) => resolve({ code: code ?? 128, stdout, stderr }));
  });
}

/** Where an executable is. The sbin folders are searched too: a user's PATH often lacks them. */
export function which(name: string): string | undefined {
  const folders = [...(process.env.PATH ?? "").split(delimiter), "/usr/sbin", "/sbin"];
  return folders
    .filter((folder) => folder !== "")
    .map((folder) => join(folder, name))
    .find((path) => {
      try {
        accessSync(path, constants.X_OK);
        return true;
      } catch {
        return false;
      }
    });
}
