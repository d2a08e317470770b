import com.android.apksig.ApkSigner;
import com.android.apksig.ApkVerifier;
import java.io.File;
import java.io.FileInputStream;
import java.io.InputStream;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.X509Certificate;
import java.util.List;

/** Signs an APK with schemes v2 and v3 and verifies it: java -cp apksig.jar Sign.java KEYSTORE PASSWORD ALIAS IN OUT MIN_SDK */
public class Sign {
    public static void main(String[] args) throws Exception {
        File keystore = new File(args[0]);
        char[] password = args[1].toCharArray();
        String alias = args[2];
        int minSdk = Integer.parseInt(args[5]);

        KeyStore keys = KeyStore.getInstance("PKCS12");
        try (InputStream input = new FileInputStream(keystore)) {
            keys.load(input, password);
        }
        PrivateKey key = (PrivateKey) keys.getKey(alias, password);
        X509Certificate certificate = (X509Certificate) keys.getCertificate(alias);
        ApkSigner.SignerConfig signer = new ApkSigner.SignerConfig.Builder(alias, key, List.of(certificate)).build();

        new ApkSigner.Builder(List.of(signer))
            .setInputApk(new File(args[3]))
            .setOutputApk(new File(args[4]))
            .setMinSdkVersion(minSdk)
            .setV1SigningEnabled(false)
            .setV2SigningEnabled(true)
            .setV3SigningEnabled(true)
            .setAlignmentPreserved(true)
            .build()
            .sign();

        ApkVerifier.Result result = new ApkVerifier.Builder(new File(args[4])).setMinCheckedPlatformVersion(minSdk).build().verify();
        boolean signed = result.isVerified() && result.isVerifiedUsingV2Scheme() && result.isVerifiedUsingV3Scheme();
        System.out.println("signed v2 and v3: " + signed + " " + result.getErrors());
        if (!signed) {
            System.exit(1);
        }
    }
}
