package org.pytorch.executorch.extension.llm;

import java.util.List;

/** ONLY TO COMPILE AGAINST, see Module. */
public class LlmModule implements java.io.Closeable {
  public static final int MODEL_TYPE_TEXT = 1;

  public LlmModule(
      int modelType,
      String modulePath,
      String tokenizerPath,
      float temperature,
      List<String> dataFiles,
      int numBos,
      int numEos) {
    throw new UnsatisfiedLinkError("this is a double to compile against; put ExecuTorch's own classes on the class path");
  }

  public void load() {}

  public void generate(
      String prompt,
      int seqLen,
      LlmCallback callback,
      boolean echo,
      float temperature,
      int numBos,
      int numEos) {}

  @Override
  public void close() {}
}
