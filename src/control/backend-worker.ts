import { workerData } from "node:worker_threads";
import { Backend } from "./backend.ts";

new Backend(workerData).run();
