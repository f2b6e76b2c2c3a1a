import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "./embedded-backend.ts";

new EmbeddedBackend(workerData).run();
