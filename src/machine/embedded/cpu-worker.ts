import { workerData } from "node:worker_threads";
import { CpuThread } from "./cpu.ts";

new CpuThread(workerData).run();
